"""Does something once for all ranks, or on each, so that all see its error."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

from checkpoints.errors import CheckpointError
from data.errors import DataError
from parallel.errors import ConfigurationError

USER_ERRORS = (ConfigurationError, DataError, CheckpointError)
Result = TypeVar("Result")


def on_rank_zero(function: Callable[[], Result], group: torch.distributed.ProcessGroup | None = None) -> Result:
    """Calls a function on rank 0 and gives its result, or its user error, to all ranks.

    Args:
        function: what to do.
        group: all ranks, as another group than the default one; for use in a thread.

    Raises:
        ConfigurationError: if the function does.
        DataError: if the function does.
        CheckpointError: if the function does.
    """
    box: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            box = [function()]
        except USER_ERRORS as error:
            box = [error]
    torch.distributed.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], USER_ERRORS):
        raise box[0]
    result: Result = box[0]
    return result


def on_every_rank(function: Callable[[], Result]) -> Result:
    """Calls a function on every rank; the first user error of any is raised by all.

    Raises:
        ConfigurationError: if the function does.
        DataError: if the function does.
        CheckpointError: if the function does.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = function()
    except USER_ERRORS as raised:
        error = raised
    errors: list[Exception | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    for first in filter(None, errors):
        raise first
    of_this_rank: Result = result
    return of_this_rank
