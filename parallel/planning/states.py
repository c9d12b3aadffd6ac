"""What a process holds of parameters, gradients and optimizer, and the buffers in which it communicates.

As DeepSpeed 0.19 does it with train/optimizer.py's settings; a test compares the sums with what is really allocated.
P values of the stage on this tensor-parallel rank, D data-parallel processes, t bytes of a weight.
"""

from dataclasses import dataclass, replace

from parallel.planning.workload import Workload

# Values of ZeRO's bucket for gradients: a quarter of a GiB in fp32, more than networks need to be at full speed.
BUCKET_VALUES = 2**26
REDUCED_VALUES = 500_000_000  # so many DeepSpeed sums at once where there is no bucket
LIVE_VALUES = 1_000_000_000  # its stage3_max_live_parameters: so much ZeRO 3 leaves gathered
PREFETCHED_VALUES = 50_000_000  # its stage3_prefetch_bucket_size: gathered in one piece ahead of use, then copied


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one process.

    Attributes:
        parameters: weights.
        optimizer: master weights and moments.
        held_gradients: buffers that exist in the whole step.
        gradients: what the backward pass of a micro-batch adds to them; where they go into the bucket as they arise,
            this process's part alone.
        accumulated: what is left of them while further micro-batches run.
        adds_gradients: those of further micro-batches are brought together before they are added.
        bucket: into which gradients are brought together, during backward passes.
        keeps_bucket: it exists in the whole step.
        gathered: parameters that ZeRO 3 has brought together.
        prefetched: the piece in which it receives more of them, until each has been copied from it.
        transit: of one bucket on its way, while it is reduced during the backward pass.
        reduction: beside all gradients, when they are reduced; activations are gone by then.
        update: beside the accumulated gradients, during the update.
    """

    parameters: float
    optimizer: float
    held_gradients: float = 0.0
    gradients: float
    accumulated: float
    adds_gradients: bool = True
    bucket: float = 0.0
    keeps_bucket: bool = False
    gathered: float = 0.0
    prefetched: float = 0.0
    transit: float = 0.0
    reduction: float
    update: float


def stage_parameters(work: Workload, stage: int) -> int:
    """Values that a process of a stage holds of it, before ZeRO shards them (P)."""
    return sum(work.parameters(piece) for piece in work.stages[stage])


def stage_states(work: Workload, stage: int) -> States:
    """States of a process of a stage."""
    parameters = float(stage_parameters(work, stage))
    kinds = {0: _replicated, 1: _sharded_optimizer, 2: _sharded_gradients, 3: _sharded_parameters}
    if work.parallel.zero_stage == 1 and work.precision == "bf16":
        return _bf16_sharded_optimizer(work, parameters)
    return kinds[work.parallel.zero_stage](work, parameters)


def bucket_values(parameters: float) -> float:
    """Values of the bucket for the gradients of a stage's parameters."""
    return min(parameters, BUCKET_VALUES)


def _bucket(work: Workload, parameters: float, value_bytes: int) -> float:
    """Bytes of the bucket; one fills while another is reduced, if they overlap."""
    buckets = 2 if work.parallel.overlap_gradient_reduction and work.parallel.zero_stage < 3 else 1
    return buckets * value_bytes * bucket_values(parameters)


def _largest_group(work: Workload, parameters: float) -> float:
    """Values of the larger of the optimizer's groups: all, or the matrices without the tables."""
    model, tensor = work.model, work.parallel.tensor
    if work.decays_all:
        return parameters
    if model.is_block:
        tables = model.tokens.hidden_size * model.embeds_local_tokens / work.shares("token_decoder.input")
        tables += model.embedder.vector_width(model.blocks.hidden_size, model.block_length) / tensor
    else:
        tables = model.vanilla.hidden_size / tensor
    exempt = min(parameters, model.vocab_size * tables) if work.parallel.pipeline == 1 else 0.0
    return max(exempt, parameters - exempt)


def _head_values(work: Workload) -> float:
    """Values of the largest parameter of a large model, on one tensor-parallel rank."""
    return work.model.vocab_size / work.parallel.tensor * work.model.stacks[-1].hidden_size


def _flat_gradients(work: Workload, parameters: float) -> float:
    """Bytes of one group's gradients, side by side for the optimizer."""
    return 4 * _largest_group(work, parameters) / work.parallel.data


def _replicated(work: Workload, parameters: float) -> States:
    """ZeRO 0, fp32: everything on each process; gradients are copied together to be summed."""
    return States(
        parameters=4 * parameters,
        optimizer=8 * parameters,
        gradients=4 * parameters,
        accumulated=4 * parameters,
        reduction=4 * min(parameters, REDUCED_VALUES),
        update=0.0,
    )


def _bf16_sharded_optimizer(work: Workload, parameters: float) -> States:
    """ZeRO 1, bf16: an fp32 sum of all gradients besides the sharded master weights and moments."""
    return States(
        parameters=2 * parameters,
        optimizer=12 * parameters / work.parallel.data,
        held_gradients=4 * parameters,
        gradients=0.0,
        accumulated=0.0,
        reduction=4 * min(parameters, REDUCED_VALUES),
        update=_gathering_copy(work, parameters),
    )


def _sharded_optimizer(work: Workload, parameters: float) -> States:
    """ZeRO 1, fp32."""
    part = 4 * parameters / work.parallel.data
    return States(
        parameters=4 * parameters,
        optimizer=3 * part,
        gradients=4 * parameters,
        accumulated=4 * parameters,
        bucket=_bucket(work, parameters, 4),
        reduction=part,
        update=part - 4 * parameters + _flat_gradients(work, parameters),
    )


def _sharded_gradients(work: Workload, parameters: float) -> States:
    """ZeRO 2: of each micro-batch's gradients a process keeps its part, all of it from the first one that it owns."""
    if work.parallel.pipeline > 1:  # gradients stay whole until all micro-batches have been through it, as under ZeRO 1
        return replace(_sharded_optimizer(work, parameters), update=_flat_gradients(work, parameters))
    size, part = work.value_bytes, 4 * parameters / work.parallel.data
    is_summed_in_place = work.precision == "bf16"  # in fp32 parts of further micro-batches are made, and added
    # Copied to be sent, and in bf16 once more as fp32; what is larger than the bucket goes by itself.
    transit = (size + 4 * (size < 4)) * max(bucket_values(parameters), _head_values(work))
    return States(
        parameters=size * parameters,
        optimizer=3 * part,
        gradients=part,
        accumulated=part,
        adds_gradients=not is_summed_in_place,
        bucket=_bucket(work, parameters, size),
        transit=transit,
        reduction=transit + (0.0 if is_summed_in_place or work.num_micro_batches == 1 else part),
        update=_gathering_copy(work, parameters) if is_summed_in_place else _flat_gradients(work, parameters),
    )


def _sharded_parameters(work: Workload, parameters: float) -> States:
    """ZeRO 3: what is gathered of the parameters counts among the buffers."""
    size, part = work.value_bytes, parameters / work.parallel.data
    scattered = 4 * max(bucket_values(parameters), _head_values(work)) * (1 if work.on_gpu else 2)
    return States(
        parameters=size * part,
        optimizer=12 * part,
        held_gradients=4 * part,
        gradients=0.0,
        accumulated=0.0,
        bucket=_bucket(work, parameters, 4),
        keeps_bucket=True,
        gathered=size * min(parameters, LIVE_VALUES) if work.parallel.data > 1 else 0.0,
        prefetched=size * min(parameters, PREFETCHED_VALUES) if work.parallel.data > 1 else 0.0,
        transit=scattered,
        reduction=scattered,
        update=_flat_gradients(work, parameters),
    )


def _gathering_copy(work: Workload, parameters: float) -> float:
    """Gloo gathers the updated weights into a copy."""
    if work.on_gpu or work.parallel.data == 1:
        return 0.0
    return work.value_bytes * _largest_group(work, parameters)
