"""Triton kernels: one per operation (`graph`), or one that stays on the GPU (`resident`)."""
