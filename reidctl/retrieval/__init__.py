"""Exact blocked search, streaming evaluation, and the table of embeddings they read."""
