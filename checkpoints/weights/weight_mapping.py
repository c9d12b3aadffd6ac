"""How tensors of another format become ours and back: one list of rules for both directions, exact to the bit."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.errors import CheckpointError

Pack = Callable[[Sequence[Tensor]], Tensor]
Unpack = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """One of our parameters and the tensors of the other format that make it.

    Attributes:
        ours: global parameter name.
        theirs: names in the other format.
        shape: shape of ours.
        pack: theirs -> ours.
        unpack: ours -> theirs; undoes pack.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    pack: Pack
    unpack: Unpack

    @property
    def their_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of their tensors."""
        return [tuple(tensor.shape) for tensor in self.unpack(torch.empty(self.shape, device="meta"))]


def same(ours: str, theirs: str, shape: tuple[int, ...]) -> Rule:
    """One tensor, alike in both formats."""
    return Rule(ours, (theirs,), shape, lambda tensors: tensors[0], lambda tensor: [tensor])


def fused_heads(ours: str, theirs: tuple[str, ...], shape: tuple[int, ...], groups: int, rows: tuple[int, ...]) -> Rule:
    """Separate projections of heads, which ours keeps in one matrix [group][query heads | key | value][head size].

    Args:
        ours: our name, a weight [rows, inputs] or a bias [rows].
        theirs: their names, in the order in which ours holds them inside a group.
        shape: shape of ours.
        groups: number of key and value heads.
        rows: rows of one group in each of theirs, such as (queries per group * head size, head size, head size).
    """
    rest = shape[1:]

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.view(groups, -1, *rest) for tensor in tensors], dim=1).reshape(shape)

    def unpack(tensor: Tensor) -> list[Tensor]:
        return [part.reshape(-1, *rest) for part in tensor.view(groups, -1, *rest).split(list(rows), dim=1)]

    return Rule(ours, theirs, shape, pack, unpack)


def convolution(ours: str, theirs: str, shape: tuple[int, ...], positions: int) -> Rule:
    """A Conv1d weight [outputs, width, positions] that ours keeps as a matrix [outputs, positions * width].

    It is applied once to `positions` vectors; our matrix to their concatenation.
    """
    outputs, inputs = shape

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].permute(0, 2, 1).reshape(shape)

    def unpack(tensor: Tensor) -> list[Tensor]:
        return [tensor.view(outputs, positions, inputs // positions).permute(0, 2, 1).contiguous()]

    return Rule(ours, (theirs,), shape, pack, unpack)


def check_tensors(
    origin: str,
    shapes: Mapping[str, tuple[int, ...]],
    rules: Iterable[Rule],
    ignored: Iterable[str] = (),
) -> None:
    """Makes sure that a source holds exactly what the rules read.

    Args:
        origin: where the tensors come from, for the message.
        shapes: name and shape of all tensors there.
        rules: what is read.
        ignored: patterns of whole names that may be there and are not read.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape; the message names both sides.
    """
    known: set[str] = set()
    for rule in rules:
        for name, expected in zip(rule.theirs, rule.their_shapes, strict=True):
            known.add(name)
            if name not in shapes:
                raise CheckpointError(f"{origin} holds no tensor {name}, which {rule.ours} of our model is made from")
            if shapes[name] != expected:
                raise CheckpointError(
                    f"{origin} holds {name} with shape {list(shapes[name])}, but {rule.ours} of our model "
                    f"{list(rule.shape)} needs {list(expected)}: its configuration belongs to other weights"
                )
    patterns = [re.compile(pattern) for pattern in ignored]
    for name in shapes:
        if name not in known and not any(pattern.fullmatch(name) for pattern in patterns):
            raise CheckpointError(
                f"{origin} holds the tensor {name} {list(shapes[name])}, which no parameter of our model is made from"
            )
