"""Device functions of sampling, acceptance and row allocation."""
