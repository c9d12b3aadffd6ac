"""The model in pipeline stages and the parallel topology."""
