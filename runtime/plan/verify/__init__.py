"""Proofs that a plan neither deadlocks nor races."""
