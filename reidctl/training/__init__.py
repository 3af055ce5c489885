"""Training: settings, optimiser, batches, the loop and what it keeps on disk."""
