"""Drafter checkpoint formats: config keys and tensor names, one project per file."""
