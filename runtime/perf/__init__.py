"""What a plan costs on a GPU, and its timeline."""
