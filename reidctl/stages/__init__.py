"""One file per stage, each with `run(...) -> record`."""
