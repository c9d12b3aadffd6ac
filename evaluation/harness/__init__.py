"""Tasks of lm-evaluation-harness on our models. Only `adapter` and what it serves import lm-eval, which is optional."""
