"""The error a user sees when a model or a parallel layout cannot be built."""


class ConfigurationError(Exception):
    """A setting is impossible; the message names the field, its value and the fix."""
