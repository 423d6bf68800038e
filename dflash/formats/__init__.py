"""Formats of drafter checkpoints: configs and tensor names, one file a format."""
