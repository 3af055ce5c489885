"""Typer commands, one file per command: flags, help and printing."""
