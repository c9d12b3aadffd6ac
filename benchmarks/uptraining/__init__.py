"""Parts of the uptraining study."""
