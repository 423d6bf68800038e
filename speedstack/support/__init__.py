"""What every part of speedstack stands on."""
