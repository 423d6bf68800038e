"""A model as the engine holds it: its spec, its weights, and layouts shared by all backends."""
