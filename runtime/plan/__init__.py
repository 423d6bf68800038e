"""A decode step as data: operations, their tiles, and what they wait for."""
