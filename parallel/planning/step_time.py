"""Time of an optimizer step from counts of FLOPs and bytes and the constants of a cluster."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from parallel.checkpointing import Policy
from parallel.costs import PieceCost
from parallel.partial_gradients import BUCKET_VALUES
from parallel.planning.activations import piece_activations, received_bytes
from parallel.planning.communication import Cluster
from parallel.planning.policies import recomputed
from parallel.planning.states import LIVE_VALUES, bucket_values, stage_parameters
from parallel.planning.workload import Workload

# How often forward and backward passes together move what a piece keeps: written, read by the next operator, read and
# written again as a gradient, twice each for the temporaries between.
PASSES_OVER_KEPT = 8.0
OPERATORS_PER_LAYER = 120.0  # forward and backward
PRODUCTS_PER_LAYER = 4.0
PASSES_AGAIN = 4.0  # how often recomputation moves what it brings back: read, written, and temporaries between
# What Python does for each layer and micro-batch: selective checkpointing looks at each operator; ZeRO 3 gathers and
# releases each module. Measured with layers so small that nothing else counts.
SELECTIVE_SECONDS = 2e-3
ZERO_3_SECONDS = 3e-3
BUCKET_PASSES = 6.0  # ZeRO copies gradients into a bucket, and from it to where they are kept: read and written
# Parameters of a piece whose gradients sequence parallelism sums, of both norms and two biases; and block parallelism.
PARTIAL_GRADIENTS, OWN_GRADIENTS = 6, 12
OPTIMIZER_BYTES = 34.0  # per parameter: gradient, master weight and both moments read and written, weight written


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, on the slowest process.

    Attributes:
        products: matrix products and attention, forward and backward.
        elementwise: norms, activations, softmax and other work bound by memory or by what Python does for it.
        recomputation: of either, by activation checkpointing.
        tensor: collectives of tensor and sequence parallelism.
        pipeline: waiting for other stages, and messages between them.
        data: reduction of gradients, and gathering of parameters.
        optimizer: the update.
    """

    products: float
    elementwise: float
    recomputation: float
    tensor: float
    pipeline: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_time(work: Workload, cluster: Cluster, policies: list[Mapping[str, Policy]]) -> StepTime:
    """Time of a step; `policies` has those of each stage's layers."""
    cluster = cluster.of(work.parallel.world_size)
    stages = [_stage_seconds(work, cluster, stage, policies[stage]) for stage in range(work.parallel.pipeline)]
    totals = [sum(stage) for stage in stages]
    slowest = max(range(len(stages)), key=lambda stage: totals[stage])
    # 1F1B: each micro-batch passes the slowest stage; the first and the last pass all others once besides.
    waiting = sum(totals) - totals[slowest]
    products, elementwise, recomputation, tensor = (part * work.num_micro_batches for part in stages[slowest])
    stage_numbers = range(work.parallel.pipeline)
    tensor += max(_partial_gradient_seconds(work, cluster, stage) for stage in stage_numbers)
    return StepTime(
        products=products,
        elementwise=elementwise,
        recomputation=recomputation,
        tensor=tensor,
        pipeline=waiting + _messages(work, cluster),
        data=max(_data_seconds(work, cluster, stage) for stage in stage_numbers),
        optimizer=max(_optimizer_seconds(work, cluster, stage_parameters(work, stage)) for stage in stage_numbers),
    )


def stage_balance(work: Workload) -> tuple[float, float]:
    """What FLOPs say of a pipeline before it runs.

    Returns:
        The fraction of a step in which processes wait (the bubble), and the work of the average stage over that of the
        slowest one.
    """
    flops = [sum(piece.forward_flops for piece in stage) for stage in work.stages]
    count = work.num_micro_batches
    step = (count - 1) * max(flops) + sum(flops)
    mean = sum(flops) / len(flops)
    return 1.0 - count * mean / step, mean / max(flops)


def _stage_seconds(
    work: Workload, cluster: Cluster, stage: int, policies: Mapping[str, Policy]
) -> tuple[float, float, float, float]:
    """Of one micro-batch: products, element-wise work, recomputation, collectives of tensor parallelism."""
    found = [_piece_seconds(work, cluster, piece, policies.get(piece.name, "none")) for piece in work.stages[stage]]
    products, elementwise, recomputation, tensor = (sum(part) for part in zip(*found, strict=True))
    return products, elementwise, recomputation, tensor


def _piece_seconds(
    work: Workload, cluster: Cluster, piece: PieceCost, policy: Policy
) -> tuple[float, float, float, float]:
    device = cluster.device
    flops = piece.forward_flops * work.micro_batch_size / work.parallel.tensor
    attention = _attention_flops(work, piece.name)
    linear = flops - attention
    products = 3.0 * (_product_seconds(work, cluster, linear) + _attention_seconds(work, cluster, attention))
    rate = device.bytes_per_second * device.memory_efficiency
    activations = piece_activations(work, piece.name, "none")
    moved = PASSES_OVER_KEPT * activations.kept
    if piece.name in ("token_decoder.output", "vanilla.output"):
        # Each logit is written, read for its largest value and its softmax, and read as a gradient; by three passes.
        logits = work.tokens * work.model.vocab_size / work.parallel.tensor
        moved += 6.0 * logits * 4.0
    elementwise = moved / rate
    again_flops, again_bytes = recomputed(work, piece, policy)
    recomputation = _product_seconds(work, cluster, again_flops) + PASSES_AGAIN * again_bytes / rate
    if ".layers." in piece.name:
        elementwise = _with_host_time(work, cluster, policy, products + recomputation, elementwise)
    return products, elementwise, recomputation, _tensor_seconds(work, cluster, piece, policy)


def _with_host_time(work: Workload, cluster: Cluster, policy: Policy, others: float, elementwise: float) -> float:
    """A layer's element-wise work, with what Python and the launch of operators add to it and to the others.

    A GPU waits for them only where it is done before; a CPU does all one after the other.
    """
    python = SELECTIVE_SECONDS if policy == "selective" else 0.0
    python += ZERO_3_SECONDS if work.parallel.zero_stage == 3 else 0.0
    launches = OPERATORS_PER_LAYER * cluster.device.launch_seconds
    if work.on_gpu:
        return max(elementwise, launches + python - others)
    return max(elementwise, launches - others) + python


def _product_seconds(work: Workload, cluster: Cluster, flops: float) -> float:
    """Small products reach less of the peak."""
    device = cluster.device
    ramp = PRODUCTS_PER_LAYER * device.product_ramp_flops if flops else 0.0
    return (flops + ramp) / (device.flops_per_second[work.precision] * device.product_efficiency)


def _attention_seconds(work: Workload, cluster: Cluster, flops: float) -> float:
    device = cluster.device
    return flops / (device.flops_per_second[work.precision] * device.attention_efficiency)


def _attention_flops(work: Workload, piece: str) -> float:
    """Of a layer's forward pass, on one process."""
    if ".layers." not in piece:
        return 0.0
    model = work.model
    if piece.startswith("token_decoder"):
        length = model.local_length + (model.num_context_vectors if model.has_cross_attention else 0)
    else:
        length = model.num_blocks if model.is_block else model.sequence_length
    return 4.0 * work.positions(piece) * length * work.stack(piece).attention_size / work.shares(piece)


def _tensor_seconds(work: Workload, cluster: Cluster, cost: PieceCost, policy: Policy) -> float:
    """Collectives of the residual stream, in the forward and the backward pass of a micro-batch."""
    parallel, piece, tensor = work.parallel, cost.name, work.parallel.tensor
    size = _summed_values(work, piece) * work.value_bytes
    if tensor == 1 or not size:
        return 0.0
    gather = cluster.all_gather(size, tensor, tensor)
    if work.is_whole(piece):
        # Ranks take their own blocks of what all have; the gradients are gathered.
        return gather if piece == "token_decoder.input" and not parallel.sequence_parallel else 0.0
    in_halves = parallel.sequence_parallel or (parallel.block_parallel and piece == "token_decoder.output")
    one = 2.0 * gather if in_halves else cluster.all_reduce(size, tensor, tensor)
    if piece == "embedder" and work.model.embedder.has_encoder:
        layers = work.model.embedder.roberta.num_layers
        return one + layers * _layer_sums(2, one, gather if parallel.sequence_parallel else 0.0, "none")
    if ".layers." not in piece:
        return one  # an embedding's output is summed in forward, the gradient of the head's input in backward
    crosses = work.model.has_cross_attention and piece.startswith("token_decoder")
    seconds = _layer_sums(3 if crosses else 2, one, gather if parallel.sequence_parallel else 0.0, policy)
    if crosses:  # the gradient of what it reads is summed, or that is gathered as a sublayer's input is
        again = 1.0 + (policy != "none") if parallel.sequence_parallel else 0.0
        seconds += (one + again * gather) * work.model.num_context_vectors / work.model.local_length
    return seconds


def _layer_sums(sublayers: int, one: float, gather: float, policy: Policy) -> float:
    """Sums after each sublayer, and again for the gradient of its input; what is computed again leaves out the last.

    Args:
        sublayers: attention, cross-attention and feed-forward.
        one: seconds of a sum.
        gather: of its half under sequence parallelism, which gathers each sublayer's input once more in its backward
            pass; 0 without.
        policy: of the layer.
    """
    again = 0.0 if policy == "none" else (sublayers - 1.0) * one + gather
    return 2.0 * sublayers * one + sublayers * gather + again


def _summed_values(work: Workload, piece: str) -> float:
    """Values of the residual stream of a micro-batch where a piece sums or gathers them."""
    model, width = work.model, work.stack(piece).hidden_size
    blocks = work.micro_batch_size * model.num_blocks if model.is_block else 0
    if piece == "block_decoder.output":
        return 0.0
    if piece == "embedder":
        vectors = model.block_length if model.embedder.has_encoder else model.embedder.num_vectors(model.block_length)
        return float(blocks * vectors * model.embedder.vector_width(width, model.block_length))
    if piece == "token_decoder.input":
        if work.is_whole(piece):
            return float(blocks * model.blocks.hidden_size)
        return float(blocks * (model.block_length - 1) * width) if model.embeds_local_tokens else 0.0
    if piece.endswith((".output", "vanilla.input")):
        return float(work.tokens * width)
    return work.positions(piece) * width


def _partial_gradient_seconds(work: Workload, cluster: Cluster, stage: int) -> float:
    """Sums of gradients of which each tensor-parallel rank has a part: once in a step, unless ZeRO reduces them before.

    They are those of what all ranks hold and run on their own positions.
    """
    parallel = work.parallel
    pieces = [piece for piece in work.stages[stage] if _partial_values(work, piece)]
    if parallel.tensor == 1 or not pieces:
        return 0.0
    values = sum(_partial_values(work, piece) for piece in pieces)
    if parallel.zero_stage < 2 and not parallel.overlap_gradient_reduction:
        buckets = math.ceil(values / BUCKET_VALUES)
        return cluster.all_reduce(4.0 * values, parallel.tensor, parallel.tensor, buckets)
    tensors = sum(OWN_GRADIENTS if work.is_whole(piece.name) else PARTIAL_GRADIENTS for piece in pieces)
    each = cluster.all_reduce(float(work.value_bytes * values), parallel.tensor, parallel.tensor, tensors)
    return work.num_micro_batches * each


def _partial_values(work: Workload, piece: PieceCost) -> int:
    """Values of a piece of whose gradients each tensor-parallel rank has a part."""
    if work.is_whole(piece.name):
        return piece.parameters
    replicated = piece.parameters - piece.split_parameters if work.parallel.sequence_parallel else 0
    return replicated + piece.shared_by(work.parallel.tensor)


def _messages(work: Workload, cluster: Cluster) -> float:
    """Messages between stages that nothing hides: one in each direction per micro-batch."""
    if work.parallel.pipeline == 1:
        return 0.0
    span = work.parallel.world_size  # where the way between two stages is longest, all wait
    largest = max(received_bytes(work, stage[0].name) for stage in work.stages[1:])
    messages = 2.0 * (work.num_micro_batches + work.parallel.pipeline - 2)
    return messages * cluster.send(largest, span, work.parallel.tensor * work.parallel.data)


def _data_seconds(work: Workload, cluster: Cluster, stage: int) -> float:
    """Reduction of fp32 gradients, bucket by bucket, and gathering of weights; what computation hides is left out."""
    hidden = cluster.device.overlap if work.parallel.overlap_gradient_reduction else 0.0
    parallel, parameters = work.parallel, stage_parameters(work, stage)
    buckets = math.ceil(parameters / bucket_values(parameters))
    has_bucket = parallel.zero_stage > 1 or work.precision == "fp32"  # ZeRO 1 keeps fp32 sums of bf16 in one piece
    moved = BUCKET_PASSES * 4.0 * parameters if has_bucket else 0.0
    copies = moved / (cluster.device.bytes_per_second * cluster.device.memory_efficiency)
    members, span = parallel.data, parallel.tensor * parallel.data
    gradients, weights = 4.0 * parameters, float(work.value_bytes * parameters)
    if parallel.zero_stage == 0:
        seconds = cluster.all_reduce(gradients, members, span)
    elif parallel.zero_stage <= 2:
        times = work.num_micro_batches if parallel.zero_stage == 2 and parallel.pipeline == 1 else 1
        each = cluster.all_reduce(gradients, members, span, buckets) + copies
        seconds = times * each + cluster.all_gather(weights, members, span)
    else:
        gather = cluster.all_gather(weights, members, span, _gathered_modules(work, stage))
        each = cluster.all_gather(gradients, members, span, buckets) + _gathers(work) * gather + copies
        seconds = work.num_micro_batches * each
    return seconds * (1.0 - hidden)


def _gathered_modules(work: Workload, stage: int) -> int:
    """Modules of a stage, each of which ZeRO 3 gathers for itself: linear layers of decoder layers, other pieces."""
    layers = sum(".layers." in piece.name for piece in work.stages[stage])
    return int(PRODUCTS_PER_LAYER) * layers + len(work.stages[stage]) - layers


def _gathers(work: Workload) -> int:
    """How often ZeRO 3 gathers a weight per micro-batch; small models stay gathered for the backward pass."""
    parameters = sum(stage_parameters(work, stage) for stage in range(work.parallel.pipeline))
    return 1 if parameters <= LIVE_VALUES else 2


def _optimizer_seconds(work: Workload, cluster: Cluster, parameters: int) -> float:
    """The update of this process's part, and the accumulation of gradients in fp32."""
    shards = work.parallel.data if work.parallel.zero_stage else 1
    moved = OPTIMIZER_BYTES * parameters / shards + 8.0 * parameters
    moved += 10.0 * parameters * work.num_micro_batches
    return moved / (cluster.device.bytes_per_second * cluster.device.memory_efficiency)
