"""Errors of the checkpoint store."""


class CheckpointError(Exception):
    """A checkpoint cannot be written, found or read; the message names the file, the cause and the fix."""
