"""The demo: its config and its stages."""
