"""Perplexity, divergence and sensitivity on held-out text."""
