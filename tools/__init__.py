"""Command line scripts, one per job."""
