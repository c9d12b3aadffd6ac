"""Weights in other formats: read, mapped to our names, converted, compared."""
