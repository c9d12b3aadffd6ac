"""Generation and throughput measurement."""
