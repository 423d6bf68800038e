"""Benchmarks of single parts, each beside a peer or a ceiling."""
