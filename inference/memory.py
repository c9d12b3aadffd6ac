"""How much memory a device has left, and what is said when it is not enough."""

import contextlib
from collections.abc import Iterator

import psutil
import torch

from inference.errors import InferenceError

# What torch says on CPU, where it has no exception of its own for it.
REFUSED_ON_CPU = "can't allocate memory"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def check_room_for_cache(needed: int, sequences: int, positions: int, device: torch.device) -> None:
    """Looks for room before memory runs out: on CPU, taking more than there is ends the process much later.

    Args:
        needed: bytes of keys and values.
        sequences: of the batch.
        positions: of each.
        device: where.

    Raises:
        InferenceError: there is not so much.
    """
    free = free_memory(device)
    if needed > free:
        raise InferenceError(
            f"the keys and values of {sequences} sequences of {positions} positions need {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; generate fewer sequences at a time, or fewer tokens"
        )


@contextlib.contextmanager
def explained_memory_errors(what: str, advice: str) -> Iterator[None]:
    """Tells a user what does not fit into the memory of the device.

    Args:
        what: the work, in the plural.
        advice: what would take less.

    Raises:
        InferenceError: memory has run out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and REFUSED_ON_CPU not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InferenceError(f"{what} do not fit into memory ({reason}); {advice}") from None
