"""Tokenizers, WebDataset shards, packing into blocks and the deterministic sequence stream."""
