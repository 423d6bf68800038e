"""What a round of decoding decides, as pure functions that the loop, the plan and the kernels share."""
