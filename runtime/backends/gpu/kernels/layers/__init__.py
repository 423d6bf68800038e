"""Device functions of the model's layers."""
