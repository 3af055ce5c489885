"""The rendered benchmark: people, clothes, cameras and captions with known truth."""
