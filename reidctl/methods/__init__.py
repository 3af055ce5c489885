"""Retrieval methods: a batch in, named losses and unit vectors out."""
