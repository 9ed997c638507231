"""Training: the step, the optimizer, the EMA, checkpoints, and the loop that composes them."""
