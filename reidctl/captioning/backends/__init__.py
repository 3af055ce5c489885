"""Describers: one file per way to turn a request into a text."""
