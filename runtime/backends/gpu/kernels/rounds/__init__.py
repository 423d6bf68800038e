"""Device functions of what a round decides."""
