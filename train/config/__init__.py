"""The configs of the training recipes."""
