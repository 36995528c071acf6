"""Vectors and labels -> one scalar."""
