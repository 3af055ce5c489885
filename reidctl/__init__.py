"""reidctl: person re-identification by text and image, from pixels to a report."""

__version__ = "0.1.0"
