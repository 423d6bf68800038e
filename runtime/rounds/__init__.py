"""Decisions of a decoding round, as pure functions shared by the loop, the plan and the kernels."""
