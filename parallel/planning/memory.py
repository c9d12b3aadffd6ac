"""Memory of a process at its worst moment, by component."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from parallel.checkpointing import Policy
from parallel.costs import PieceCost
from parallel.planning.activations import gathered_bytes, piece_activations, received_bytes
from parallel.planning.states import LIVE_VALUES, States, bucket_values, stage_states
from parallel.planning.workload import Workload


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, all of them at the same moment.

    Attributes:
        parameters: weights.
        optimizer: master weights and moments.
        gradients: of parameters.
        activations: kept for backward passes, of all micro-batches in flight.
        workspace: of the piece that is running: logits, recomputed tensors, gradients of activations.
        communication: buffers, and what ZeRO 3 and sequence parallelism gather.
    """

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    workspace: float
    communication: float

    @property
    def total(self) -> float:
        """All components together."""
        return sum(getattr(self, field.name) for field in fields(self))


def stage_memory(work: Workload, stage: int, policies: Mapping[str, Policy]) -> Memory:
    """Peak of a process of a pipeline stage.

    Args:
        work: what is trained.
        stage: which stage.
        policies: of its decoder layers, by piece.
    """
    states = stage_states(work, stage)
    return max(_moments(work, stage, policies, states), key=lambda memory: memory.total)


def activation_bytes(work: Workload, stage: int, policies: Mapping[str, Policy]) -> float:
    """Activations and workspace of a process at their peak: what a budget is for."""
    nothing = States(parameters=0.0, optimizer=0.0, gradients=0.0, accumulated=0.0, reduction=0.0, update=0.0)
    return max(memory.activations + memory.workspace for memory in _moments(work, stage, policies, nothing))


def _moments(work: Workload, stage: int, policies: Mapping[str, Policy], states: States) -> Iterator[Memory]:
    """Memory during each piece's forward and backward pass, the reduction and the update."""
    names = [piece.name for piece in work.stages[stage]]
    gathered = max(gathered_bytes(work, name) for name in names) * (
        1 if work.on_gpu else 2
    )  # gloo scatters from a copy
    static = (states.parameters, states.optimizer)
    for activations, workspace, gradients, communication in _passes(work, stage, policies, states):
        communication += gathered + states.gathered + (states.bucket if states.keeps_bucket else 0.0)
        yield Memory(*static, states.held_gradients + gradients, activations, workspace, communication)
    gradients = states.held_gradients + states.gradients
    yield Memory(*static, gradients, 0.0, 0.0, gathered + states.gathered + states.bucket + states.reduction)
    kept_bucket = states.bucket if states.keeps_bucket else 0.0
    yield Memory(*static, states.held_gradients + states.accumulated, 0.0, 0.0, gathered + kept_bucket + states.update)


def _passes(
    work: Workload, stage: int, policies: Mapping[str, Policy], states: States
) -> Iterator[tuple[float, float, float, float]]:
    """The newest micro-batch's passes through each piece: activations, workspace, gradients, what is being sent."""
    pieces = work.stages[stage]
    found = [piece_activations(work, piece.name, policies.get(piece.name, "none")) for piece in pieces]
    in_flight = work.in_flight(stage)
    received = received_bytes(work, pieces[0].name) if stage else 0.0
    kept = (in_flight - 1) * (sum(one.kept for one in found) + received) + received
    # Once as many micro-batches are in flight as ever, a first backward pass has run, unless there are no more.
    is_first = work.num_micro_batches <= in_flight
    before = 0.0 if is_first else states.accumulated
    bucket = 0.0 if states.keeps_bucket or _reduces_later(work) else states.bucket
    total = later = sum(work.parameters(piece) for piece in pieces)
    for piece, one in zip(pieces, found, strict=True):
        kept += one.kept
        fetched = states.prefetched if piece is not pieces[-1] else 0.0  # by then all are there
        yield kept, one.forward, before, fetched + (0.0 if is_first or work.parallel.zero_stage != 1 else bucket)
        later -= work.parameters(piece)
        if work.parallel.zero_stage >= 2 and work.parallel.pipeline == 1:
            has_reduced = total - later > bucket_values(total)  # a first bucket; then this process's part is there
            arisen = states.gradients if has_reduced and (is_first or states.adds_gradients) else 0.0
            sent = bucket + (states.transit if has_reduced else 0.0)
        else:
            arisen = states.gradients * later / max(1, total) if is_first else 0.0
            sent = bucket
        sent += fetched if total > LIVE_VALUES else 0.0  # what was gathered in the forward pass has not stayed
        yield kept, one.backward + _own_gradient(work, piece), before + arisen, sent


def _reduces_later(work: Workload) -> bool:
    """Whether ZeRO 2 makes its bucket when all micro-batches have been through a pipeline."""
    return work.parallel.zero_stage == 2 and work.parallel.pipeline > 1


def _own_gradient(work: Workload, piece: PieceCost) -> float:
    """Gradients that arise in a piece's backward pass, before they go where all are; the head has its own in fp32."""
    if piece.name in ("token_decoder.output", "vanilla.output") and work.precision == "fp32":
        return 0.0
    return work.parameters(piece) * work.value_bytes
