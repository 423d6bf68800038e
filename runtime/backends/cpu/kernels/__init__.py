"""Kernels of the runtime: C++ for CPUs, compiled once a machine by the compiler that is there."""
