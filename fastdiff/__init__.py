"""fastdiff: small diffusion models, trained fast, in code that is easy to read."""
