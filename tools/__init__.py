"""What a person runs: one thin script per job."""
