"""Where files lie: URLs, and the user's cache folder."""

import os
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from data.errors import DataError


def split_url(location: str) -> SplitResult:
    """Takes a URL apart.

    Args:
        location: The URL of a corpus.

    Returns:
        Its parts.

    Raises:
        DataError: It is malformed.
    """
    try:
        return urlsplit(location)
    except ValueError as error:
        # Without password and signature.
        shown = location.partition("?")[0].rpartition("@")[2]
        raise DataError(f"data.path {shown} is a malformed URL ({error}); correct it") from None


def user_cache_folder() -> Path | None:
    """Finds where this user's programs may keep what they can make again.

    Returns:
        The folder `block-transformer` in $XDG_CACHE_HOME or ~/.cache, which may not exist yet; None if neither the
        environment nor the system knows a home directory.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "block-transformer"
    except RuntimeError:
        return None
