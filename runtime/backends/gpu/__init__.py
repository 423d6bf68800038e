"""Triton kernels: one an operation (`graph`), or one that stays on the GPU (`resident`)."""
