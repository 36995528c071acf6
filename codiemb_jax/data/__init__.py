"""Prepares data files and loads planned batches onto devices."""
