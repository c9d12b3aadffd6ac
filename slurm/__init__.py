"""Launching and requeueing on a cluster."""
