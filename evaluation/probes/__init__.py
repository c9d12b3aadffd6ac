"""What the parts of a Block Transformer attend to and pass on."""
