"""Parses records, tokenizes texts and lays them out in rows."""
