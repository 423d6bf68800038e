"""The benchmark harness and who takes part in it."""
