"""The error class for mistakes in data, tokenizers and data settings."""


class DataError(Exception):
    """A user can fix this: the message names the file or field, its value and the fix in one sentence."""


class MissingFileError(DataError):
    """A file of a corpus is not there, or whoever has it does not give it."""
