"""Formats of drafter checkpoints: config keys and tensor names of one project a file."""
