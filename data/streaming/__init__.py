"""Shards to sequences: packing, order, mixtures, files from elsewhere."""
