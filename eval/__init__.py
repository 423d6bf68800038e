"""Measurements through the runtime: quality, lm-eval, acceptance, timing against peers; and their report."""
