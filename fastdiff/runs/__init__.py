"""Run directories on the disk: metrics, checkpoints, locks, and what is read back from them."""
