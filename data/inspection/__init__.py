"""Looks into prepared corpora."""
