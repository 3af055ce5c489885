"""Part phrases of captions: which words name which part of a person."""
