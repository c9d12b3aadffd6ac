"""How fast a model generates, and how much memory that takes."""
