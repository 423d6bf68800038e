"""A model as the engine holds it: its spec, its weights, and the layouts that every backend shares."""
