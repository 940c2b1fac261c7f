"""Training of the weights that are kept: block by block, and of the whole model."""
