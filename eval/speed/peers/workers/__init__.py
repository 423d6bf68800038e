"""What runs in the environments of peers, one process each. Nothing here imports speedstack, or is imported by it."""
