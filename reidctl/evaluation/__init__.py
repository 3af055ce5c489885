"""What is evaluated and against what: protocols, baselines, robustness settings, published numbers."""
