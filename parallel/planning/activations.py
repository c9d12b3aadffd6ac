"""What the pieces of the model keep of a micro-batch from its forward to its backward pass, in bytes of one process.

Each piece counts its output and what its backward pass reads, without its input, which is the output of the piece
before. The terms are the tensors that autograd holds; a test compares the sums with what is really allocated.
"""

import math
from dataclasses import dataclass

from parallel.attend import SHORT
from parallel.checkpointing import Policy
from parallel.linear_cross_entropy import CHUNK_BYTES
from parallel.planning.workload import Workload

STATISTIC_BYTES = 4  # means, deviations and logarithms of sums are fp32
ID_BYTES = 8


@dataclass(frozen=True)
class Activations:
    """Of one piece and micro-batch.

    Attributes:
        kept: bytes from the forward pass to the backward pass.
        forward: bytes beside them at the end of the piece's forward pass.
        backward: bytes beside them during the piece's backward pass only, recomputation included.
    """

    kept: float
    forward: float
    backward: float


def piece_activations(work: Workload, piece: str, policy: Policy = "none") -> Activations:
    """Activations of a piece; `policy` is that of a decoder layer."""
    if ".layers." in piece:
        return _layer(work, piece, policy)
    if piece == "embedder":
        return _embedder(work)
    if piece == "block_decoder.output":
        stack = work.model.blocks
        norm = _norm(work, stack.hidden_size) * _own_rows(work, piece)
        return Activations(norm, 0.0, 2.0 * norm)
    if piece == "token_decoder.input":
        return _token_input(work)
    if piece == "vanilla.input":
        output = work.tokens * work.model.vanilla.hidden_size * work.value_bytes / _sharding(work, piece)
        return Activations(output, 0.0, output)
    return _output(work, piece)


def received_bytes(work: Workload, piece: str) -> float:
    """What a pipeline stage that begins with a piece receives for each micro-batch."""
    model = work.model
    if piece.startswith("token_decoder") and piece != "token_decoder.input":
        values = work.micro_batch_size * model.num_blocks * model.carried_length * model.tokens.hidden_size
        return values * work.value_bytes / _sharding(work, piece)
    width = model.blocks.hidden_size if model.is_block else model.vanilla.hidden_size
    values = work.micro_batch_size * (model.sequence_length // model.unit_length) * width
    return values * work.value_bytes / (work.parallel.tensor if work.parallel.sequence_parallel else 1)


def gathered_bytes(work: Workload, piece: str) -> float:
    """The largest tensor that sequence parallelism gathers for a piece."""
    if not work.parallel.sequence_parallel or work.is_whole(piece):
        return 0.0
    return work.positions(piece) * work.stack(piece).hidden_size * work.value_bytes


def _sharding(work: Workload, piece: str) -> int:
    """Processes among which the residual stream is sharded where it enters or leaves a piece."""
    by_blocks = work.parallel.block_parallel and piece.startswith("token_decoder")
    return work.parallel.tensor if work.parallel.sequence_parallel or by_blocks else 1


def _own_rows(work: Workload, piece: str) -> float:
    return work.positions(piece) / (1 if work.is_whole(piece) else _sharding(work, piece))


def _norm(work: Workload, width: float) -> float:
    """Bytes per row of a norm's output and statistics; the input is counted where it arises."""
    is_layer_norm = work.model.backbone.norm == "layer_norm"
    values = width * work.value_bytes
    composed = 0.0 if is_layer_norm else width * _composed_norm_bytes(work)
    return values + composed + STATISTIC_BYTES * (2 if is_layer_norm else 1)


def _composed_norm_bytes(work: Workload) -> int:
    """Bytes per value that an RMSNorm keeps besides its output: GPUs have a fused one; elsewhere it works in fp32."""
    if work.on_gpu:
        return 0
    return 8 if work.precision == "bf16" else 4


@dataclass(frozen=True)
class _Sizes:
    """Values per position of a layer on one tensor-parallel rank."""

    width: int
    queries: float
    keys: float
    inner: float
    heads: float
    key_heads: float

    @property
    def fused(self) -> float:
        return self.queries + 2 * self.keys


def _sizes(work: Workload, piece: str) -> _Sizes:
    stack, tensor = work.stack(piece), work.shares(piece)
    key_heads = max(1.0, stack.key_value_heads / tensor)
    return _Sizes(
        width=stack.hidden_size,
        queries=stack.attention_size / tensor,
        keys=key_heads * stack.head_size,
        inner=stack.feed_forward_size / tensor,
        heads=stack.num_attention_heads / tensor,
        key_heads=key_heads,
    )


def _layer(work: Workload, piece: str, policy: Policy) -> Activations:
    sizes, rows, own_rows = _sizes(work, piece), work.positions(piece), _own_rows(work, piece)
    swiglu = work.model.backbone.feed_forward == "swiglu"
    output = own_rows * sizes.width * work.value_bytes
    if work.model.has_cross_attention and piece.startswith("token_decoder"):
        output *= work.model.carried_length / work.model.local_length
    products = _self_attention_products(work, piece, sizes) + sizes.inner * work.value_bytes * (2 if swiglu else 1)
    everything = _self_attention(work, piece, sizes) + sizes.inner * work.value_bytes * (4 if swiglu else 2)
    residual = _residual(work, sizes)
    if work.model.has_cross_attention and piece.startswith("token_decoder"):
        cross = _cross_attention(work, sizes)
        products, everything, residual = products + cross, everything + cross, residual * 1.5
    full = output + rows * everything + own_rows * residual
    kept = {"none": full, "selective": output + rows * products, "layer": output}[policy]
    # The gradients of the output and of the inner activation, of both of a gated one.
    workspace = output + rows * sizes.inner * work.value_bytes * (2 if swiglu else 1)
    return Activations(kept, output, workspace + full - kept)


def _residual(work: Workload, sizes: _Sizes) -> float:
    """Bytes per row of both norms, and of what a sequential layer adds up between them."""
    between = 0 if work.model.backbone.residual == "parallel" else sizes.width * work.value_bytes
    return 2 * _norm(work, sizes.width) + between


def _length(work: Workload, piece: str) -> int:
    """Positions that attend to each other."""
    model = work.model
    if piece.startswith("token_decoder"):
        return model.local_length
    return model.num_blocks if model.is_block else model.sequence_length


def _is_written_out(work: Workload, piece: str) -> bool:
    """Whether attention is computed by plain products (parallel/attend.py)."""
    return not work.on_gpu and work.precision == "fp32" and _length(work, piece) <= SHORT


def _self_attention_products(work: Workload, piece: str, sizes: _Sizes) -> float:
    """Bytes per position of the fused queries, keys and values, and of attention's output."""
    size = (sizes.fused + sizes.queries) * work.value_bytes
    scores = _length(work, piece) * work.value_bytes if _is_written_out(work, piece) else STATISTIC_BYTES
    return size + sizes.heads * scores


def _self_attention(work: Workload, piece: str, sizes: _Sizes) -> float:
    """Bytes per position; rotated queries and keys are copies."""
    backbone, stack = work.model.backbone, work.stack(piece)
    norms = _head_norms(work, sizes) if backbone.query_key_norm else 0.0
    if _is_written_out(work, piece):
        return norms + _written_out_attention(work, piece, sizes) * work.value_bytes
    size = norms + _self_attention_products(work, piece, sizes)
    if int(stack.head_size * backbone.rotary_fraction) or backbone.query_key_norm:
        size += (sizes.queries + sizes.keys) * work.value_bytes
    if _copies_attention_output(work, piece):
        size += sizes.queries * work.value_bytes
    return size


def _written_out_attention(work: Workload, piece: str, sizes: _Sizes) -> float:
    """Values per position: scaled queries, keys, values, probabilities, the result."""
    length = _length(work, piece)
    size = 2 * sizes.queries + sizes.heads * length
    if sizes.heads > sizes.key_heads:  # keys and values are repeated for each query head
        return size + 2 * sizes.queries
    # The values are a view of the fused tensor where their heads lie one behind the other, else a copy.
    has_view = length == 1 or not piece.startswith("token_decoder")
    return size + sizes.keys + (sizes.fused if has_view else sizes.keys)


def _head_norms(work: Workload, sizes: _Sizes) -> float:
    """Bytes per position of the norms of queries and keys, whose outputs are counted as rotated ones."""
    heads = sizes.heads + sizes.key_heads
    size = heads * STATISTIC_BYTES + (sizes.queries + sizes.keys) * _composed_norm_bytes(work)
    if sizes.heads > sizes.key_heads > 1:  # the heads of several groups lie apart and are brought together
        size += sizes.queries * work.value_bytes
    return size


def _copies_attention_output(work: Workload, piece: str) -> bool:
    """Whether the heads of each position must be brought together: kernels lay their outputs out as their inputs."""
    is_local = piece.startswith("token_decoder")
    if work.on_gpu:
        return not is_local and work.micro_batch_size > 1
    return not (is_local and work.model.local_length == 1)


def _cross_attention(work: Workload, sizes: _Sizes) -> float:
    """Bytes per position: queries, attention's output and, for all vectors of the context, keys and values."""
    context = work.model.num_context_vectors / work.model.local_length
    values = 2 * sizes.queries + 2 * sizes.keys * context
    return values * work.value_bytes + sizes.heads * STATISTIC_BYTES


def _embedder(work: Workload) -> Activations:
    model, embedder = work.model, work.model.embedder
    width, rows = model.blocks.hidden_size, work.tokens / model.block_length / _sharding(work, "embedder")
    output = rows * width * work.value_bytes
    kept = output + (work.tokens * ID_BYTES if model.block_length > 1 else 0)
    if embedder.has_projection:
        vector = embedder.vector_width(width, model.block_length)
        kept += rows * embedder.num_vectors(model.block_length) * vector * work.value_bytes
    if embedder.has_encoder:
        kept += _encoder(work)
    return Activations(kept, output, 2 * output)


def _encoder(work: Workload) -> float:
    """A RoBERTa encoder: in each layer two norms behind their sums, attention written out, feed-forward."""
    model, tensor = work.model, work.parallel.tensor
    encoder = model.embedder.roberta
    length = model.block_length + (model.embedder.num_cls_tokens if model.embedder.kind == "roberta_cls" else 0)
    rows = work.tokens / model.block_length * length
    residual = rows / _sharding(work, "embedder") * (2 * encoder.hidden_size * work.value_bytes + 2 * STATISTIC_BYTES)
    scores = 2 * encoder.num_attention_heads * length / tensor
    inner = (3 * encoder.hidden_size + 2 * encoder.stack.feed_forward_size) / tensor
    layer = 2 * residual + rows * (inner + scores) * work.value_bytes
    return encoder.num_layers * layer + residual


def _token_input(work: Workload) -> Activations:
    model = work.model
    rows = work.micro_batch_size * model.num_blocks
    output = (
        rows
        * model.carried_length
        * model.tokens.hidden_size
        * work.value_bytes
        / _sharding(work, "token_decoder.input")
    )
    shifted = 0 if model.token_decoder_input == "prefix" else rows * model.block_length * ID_BYTES
    return Activations(output + shifted, output, 2 * output)


def _output(work: Workload, piece: str) -> Activations:
    """The head: gradients of its inputs and of its weight are ready when the forward pass ends."""
    model, tensor = work.model, work.parallel.tensor
    width = model.stacks[-1].hidden_size
    targets = work.micro_batch_size * (model.sequence_length - model.unit_length)
    kept: float
    norm = _norm(work, width) - width * work.value_bytes  # its output is not kept, but the chosen rows of it are
    weight = model.vocab_size / tensor * width
    kept = targets * (2 * width * work.value_bytes + STATISTIC_BYTES + 2 * ID_BYTES)
    kept += work.tokens * norm / _sharding(work, piece) + weight * 4
    most = max(1, CHUNK_BYTES // (4 * (model.vocab_size // tensor)))
    chunk = math.ceil(targets / math.ceil(targets / most)) * model.vocab_size / tensor
    rows = work.tokens * width * work.value_bytes  # the norm's output, and what sequence parallelism gathers of it
    forward = rows * (1 + (_sharding(work, piece) > 1)) + chunk * 4.0
    if work.precision == "bf16":  # logits, fp32 probabilities, their gradient; a product that is added up
        forward += chunk * (4.0 if work.on_gpu else 8.0) + weight * 2.0
    return Activations(kept, forward, rows)
