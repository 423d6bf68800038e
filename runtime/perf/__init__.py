"""A plan's cost on a GPU, and its timeline."""
