"""Compiled kernels for AVX2, AVX-512 and NEON."""
