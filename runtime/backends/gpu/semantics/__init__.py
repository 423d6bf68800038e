"""The operations of a plan in PyTorch: what their kernels are compared with."""
