"""Megatron-core's tensor-parallel linear layers and embedding table, and how their parameters are marked."""

from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.products import linear


def tensor_group(megatron: TransformerConfig) -> torch.distributed.ProcessGroup:
    """The processes that share a layer's matrices: the tensor-parallel group, or this process alone."""
    if megatron.tensor_model_parallel_size > 1:
        group: torch.distributed.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return group
    # There is no context parallelism, so its groups hold one process each.
    alone: torch.distributed.ProcessGroup = parallel_state.get_context_parallel_group()
    return alone


def _no_initialization(weight: Tensor) -> None:
    """Weights are set by parallel.initialization, by name, alike under every layout."""


def mark_split(weight: nn.Parameter, axis: int) -> None:
    """Marks a weight as split along an axis; Megatron-core does so only when it initializes the weight itself."""
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)


def mark_partial_gradient(module: nn.Module, partial: bool) -> None:
    """Marks replicated parameters whose gradient on each rank is only a part and must be summed over TP.

    So it is under sequence parallelism, where each rank sees only its own rows, and where each rank has its own heads.
    The attribute is the one that Megatron-core sets on the biases of its row-parallel layers.
    """
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = partial  # type: ignore[attr-defined]


class ColumnLinear(ColumnParallelLinear):
    """Linear layer whose output features are split.

    On CPU with the products of parallel.products, which also add the bias without another pass over the output.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        # Under sequence parallelism Megatron-core gathers the input as well, and anew in backward.
        if options["sequence_parallel"] or input.device.type != "cpu":
            result: Tensor = super()._forward_impl(input, weight, bias=bias, **options)
            return result
        return linear(input, weight, bias, options["tp_group"] if options["allreduce_dgrad"] else None)


class RowLinear(RowParallelLinear):
    """Linear layer whose input features are split.

    Megatron-core's product keeps its factors when it has been computed; what is computed again of a layer would then
    end with its last product, not before it.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_options: Any) -> Tensor:
        return linear(input, weight, bias)


def column_parallel(
    inputs: int,
    outputs: int,
    megatron: TransformerConfig,
    bias: bool = True,
    own_weight: bool = True,
    layer_class: type[ColumnLinear] = ColumnLinear,
) -> ColumnLinear:
    """Linear layer whose output features are split over the tensor-parallel group.

    Args:
        inputs: input features.
        outputs: output features.
        megatron: Megatron-core's settings.
        bias: whether it has a bias.
        own_weight: False leaves the weight out; it is tied to another layer's afterwards.
        layer_class: what to build.
    """
    layer = layer_class(
        inputs,
        outputs,
        config=megatron,
        init_method=_no_initialization,
        bias=bias,
        gather_output=False,
        skip_weight_param_allocation=not own_weight,
        tp_group=tensor_group(megatron),
    )
    if own_weight:
        mark_split(layer.weight, axis=0)
    return layer


def row_parallel(inputs: int, outputs: int, megatron: TransformerConfig, bias: bool = True) -> RowLinear:
    """Linear layer whose input features are split over the tensor-parallel group."""
    layer = RowLinear(
        inputs,
        outputs,
        config=megatron,
        init_method=_no_initialization,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tensor_group(megatron),
    )
    mark_split(layer.weight, axis=1)
    return layer


def replicated(inputs: int, outputs: int, megatron: TransformerConfig) -> nn.Linear:
    """Linear layer that every tensor-parallel rank holds whole and applies to its own rows."""
    layer = nn.Linear(inputs, outputs, dtype=megatron.params_dtype)
    mark_partial_gradient(layer, megatron.sequence_parallel)
    return layer


class SharedRowsLinear(nn.Module):
    """Linear layer that every tensor-parallel rank holds whole and of which it computes some output features.

    For matrices whose features do not divide, such as fused queries, keys and values where ranks share a key head. Its
    gradient is a part on each rank; that of its input is summed over the ranks, as in a column-parallel layer.

    Args:
        inputs: input features.
        outputs: output features.
        rows: int64, the output features of this rank.
        megatron: Megatron-core's settings.
        bias: whether it has a bias.
    """

    rows: Tensor

    def __init__(self, inputs: int, outputs: int, rows: Tensor, megatron: TransformerConfig, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=megatron.params_dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=megatron.params_dtype)) if bias else None
        self.sequence_parallel = megatron.sequence_parallel
        self.register_buffer("rows", rows, persistent=False)
        mark_partial_gradient(self, megatron.tensor_model_parallel_size > 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """This rank's output features of all rows of hidden states; Megatron-core's layers return a pair too."""
        gather = (
            gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        )
        hidden = gather(hidden, group=parallel_state.get_tensor_model_parallel_group())
        bias = None if self.bias is None else self.bias[self.rows]
        return linear(hidden, self.weight[self.rows], bias), None


class TokenEmbedding(VocabParallelEmbedding):
    """Embedding table split over the vocabulary; looks rows of ids up as [rows, columns, width]."""

    def __init__(self, vocab_size: int, width: int, megatron: TransformerConfig) -> None:
        super().__init__(
            vocab_size,
            width,
            init_method=_no_initialization,
            reduce_scatter_embeddings=megatron.sequence_parallel,
            config=megatron,
            tp_group=tensor_group(megatron),
        )
        mark_split(self.weight, axis=0)

    def forward(self, ids: Tensor) -> Tensor:
        """Looks ids [rows, columns] up; rows are scattered over TP under sequence parallelism."""
        # Megatron-core's reduce-scatter transposes [columns, rows] into rows first; its all-reduce does not.
        return super().forward(ids.t().contiguous() if self.reduce_scatter_embeddings else ids)


def local_rows(values: Tensor, megatron: TransformerConfig) -> Tensor:
    """This rank's rows of values that every rank has; all of them without sequence parallelism."""
    if not megatron.sequence_parallel:
        return values
    size = len(values) // parallel_state.get_tensor_model_parallel_world_size()
    return values.narrow(0, parallel_state.get_tensor_model_parallel_rank() * size, size)
