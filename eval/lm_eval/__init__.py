"""lm-eval's tasks and suites through the engine."""
