"""Readers of public and private datasets."""
