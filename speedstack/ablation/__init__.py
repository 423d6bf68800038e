"""Grids and tables of ablations."""
