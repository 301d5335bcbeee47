"""Exchange with the rest of the world: images in common formats out of the repository and into it, and over NBD."""
