"""Image sets as uint8 arrays, and two loaders that give identical batches."""
