"""Sampling from trained networks, and the Frechet distance of the samples to real images."""
