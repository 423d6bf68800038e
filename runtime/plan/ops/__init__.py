"""The operations of a decode step."""
