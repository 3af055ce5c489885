"""Other people's checkpoints as models of ours: reading, naming, sizes, heads."""
