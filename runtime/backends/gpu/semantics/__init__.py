"""A plan's operations in PyTorch, the reference for their kernels."""
