"""The training loop, trainers, checkpoints and optimizers that all recipes share."""
