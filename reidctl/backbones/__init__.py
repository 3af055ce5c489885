"""Image and text encoders behind one contract: CLIP towers (open_clip) and ViT + BERT (transformers)."""
