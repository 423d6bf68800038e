"""Ways of computing a decode step."""
