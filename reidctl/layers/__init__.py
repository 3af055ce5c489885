"""Trainable parts that methods are put together from."""
