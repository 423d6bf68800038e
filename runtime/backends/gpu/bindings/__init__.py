"""Where the kernels of each operation find their tensors."""
