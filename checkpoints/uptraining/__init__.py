"""Initial weights of a Block Transformer from those of a vanilla model."""
