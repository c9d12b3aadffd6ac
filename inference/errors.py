"""The error a user sees when text cannot be generated."""


class InferenceError(Exception):
    """A prompt, a setting or the model does not allow generation; the message names the cause and the fix."""
