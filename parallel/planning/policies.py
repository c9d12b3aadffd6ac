"""Which layers recompute what, so that the activations of a process fit into a budget."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from parallel.checkpointing import POLICIES, Policy
from parallel.costs import PieceCost
from parallel.errors import ConfigurationError
from parallel.planning.activations import piece_activations
from parallel.planning.memory import activation_bytes
from parallel.planning.workload import Workload

GIB = 2**30
# What moving a byte costs in FLOPs, roughly, on CPUs and GPUs alike: for ranking what is recomputed, not for times.
FLOPS_PER_BYTE = 50.0


class BudgetError(ConfigurationError, ValueError):
    """Not even with all layers recomputed do the activations fit."""


def stage_policies(work: Workload, stage: int) -> dict[str, Policy]:
    """The policy of each decoder layer of a stage.

    Raises:
        BudgetError: names the field, the budget and the least that would do.
    """
    layers = [piece for piece in work.stages[stage] if ".layers." in piece.name]
    chosen = work.parallel.activation_checkpointing
    if chosen != "budget":
        return {piece.name: chosen for piece in layers}
    assert work.parallel.activation_memory_gib is not None
    return _cheapest(work, stage, layers, work.parallel.activation_memory_gib)


def check_budget(work: Workload) -> None:
    """Checks that the activations of every stage can be made to fit, on GPU or CPU: who asks may not be who trains.

    Raises:
        BudgetError: see stage_policies.
    """
    try:
        _check(replace(work, on_gpu=True))
    except BudgetError:
        _check(replace(work, on_gpu=False))


def _check(work: Workload) -> None:
    for stage in range(work.parallel.pipeline):
        stage_policies(work, stage)


def recomputed(work: Workload, piece: PieceCost, policy: Policy) -> tuple[float, float]:
    """What a layer recomputes for a micro-batch on one process: FLOPs of products, bytes of other results."""
    if policy == "none":
        return 0.0, 0.0
    everything, kept = (piece_activations(work, piece.name, which).kept for which in ("none", policy))
    flops = piece.forward_flops * work.micro_batch_size / work.parallel.tensor
    if policy == "layer":
        # The last product of a layer is not needed again.
        last = 2.0 * work.positions(piece.name) * work.stack(piece.name).feed_forward_size
        return flops - last * work.stack(piece.name).hidden_size / work.shares(piece.name), everything - kept
    stack = work.stack(piece.name)
    dense = 2.0 * work.positions(piece.name) * stack.attention_size * stack.hidden_size / work.shares(piece.name)
    attentions = 2 if work.model.has_cross_attention and piece.name.startswith("token_decoder") else 1
    return attentions * dense, everything - kept


def _cheapest(work: Workload, stage: int, layers: list[PieceCost], budget: float) -> dict[str, Policy]:
    """Gives up, one layer at a time, what saves most memory for what it costs to recompute."""
    policies: dict[str, Policy] = {piece.name: "none" for piece in layers}
    steps = sorted(
        (_price(work, piece, lower, higher), i, higher, piece.name)
        for i, piece in enumerate(layers)
        for lower, higher in pairwise(POLICIES)
    )
    for _, _, higher, name in steps:
        if activation_bytes(work, stage, policies) <= budget * GIB:
            return policies
        # A layer may have gone further already, where that costs less per byte.
        policies[name] = max(policies[name], higher, key=POLICIES.index)
    needed = activation_bytes(work, stage, policies)
    if needed <= budget * GIB:
        return policies
    raise BudgetError(
        f"parallel.activation_memory_gib={budget:g} is less than the {_rounded_up(needed)} GiB that the activations of "
        f"pipeline stage {stage} need with every layer recomputed; raise it, lower train.micro_batch_size="
        f"{work.micro_batch_size}, or use more tensor-parallel processes"
    )


def _rounded_up(needed: float) -> float:
    return -(-needed * 1000 // GIB) / 1000


def _price(work: Workload, piece: PieceCost, lower: Policy, higher: Policy) -> float:
    """What a step of a layer to the next policy costs per byte that it frees."""
    freed = piece_activations(work, piece.name, lower).kept - piece_activations(work, piece.name, higher).kept
    before, after = (_effort(*recomputed(work, piece, policy)) for policy in (lower, higher))
    return (after - before) / freed


def _effort(flops: float, moved_bytes: float) -> float:
    return flops + FLOPS_PER_BYTE * moved_bytes


def policy_counts(policies: Mapping[str, Policy]) -> dict[Policy, int]:
    """How many layers have each policy."""
    return {policy: sum(value == policy for value in policies.values()) for policy in POLICIES}
