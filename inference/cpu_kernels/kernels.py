"""Decoder layers and linear layers as the C++ library computes them: fp32, on CPU, without tensor parallelism.

B sequences (for a token decoder, one block of each), T new positions, D width.
"""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from inference.cpu_kernels.library import Layer, Library, Matrix, Norm, Stack, Step, load_kernels
from parallel.decoder_layer import CrossAttentionLayer, DecoderLayer


def kernels_for(values: Tensor) -> Library | None:
    """The library, if it computes with values like these."""
    return load_kernels() if values.device.type == "cpu" and values.dtype is torch.float32 else None


def _kernels_for_module(module: nn.Module) -> Library | None:
    """The same, for a layer of the model; the library does not know tensor parallelism."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return None
    return kernels_for(module.get_parameter("weight"))


class _Holder:
    """Makes the library's structures from modules, and keeps the memory alive that they point to.

    Args:
        library: whose.
        modules: all matrices that will be packed lie in these; they come to lie side by side.
    """

    def __init__(self, library: Library, modules: Sequence[nn.Module]) -> None:
        self._library = library
        weights = [weight for module in modules for weight in module.parameters() if weight.dim() == 2]
        self._free = library.memory(sum(library.packed_size(weight) for weight in weights))
        self._tensors = [self._free]

    def matrix(self, linear: nn.Module) -> Matrix:
        """Packs a linear layer: torch's or Megatron-core's."""
        weight = linear.get_parameter("weight").detach()
        size = self._library.packed_size(weight)
        panels, self._free = self._free[:size], self._free[size:]
        self._library.pack(weight, panels)
        return Matrix(panels.data_ptr(), self._keep(linear._parameters.get("bias")), weight.shape[1], weight.shape[0])

    def norm(self, norm: nn.Module) -> Norm:
        """Takes over a norm."""
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        return Norm(self._keep(norm.weight), self._keep(bias), norm.eps, isinstance(norm, nn.RMSNorm))

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._tensors.append(tensor.detach())
        return tensor.data_ptr()


class StackKernel:
    """The layers of one decoder; see parallel.decoder_layer for what they compute.

    Args:
        library: computes them.
        layers: in order; they are alike.
    """

    def __init__(self, library: Library, layers: Sequence[DecoderLayer]) -> None:
        self._library = library
        self._holder = _Holder(library, layers)
        self._layers = (Layer * len(layers))(*(self._layer(layer) for layer in layers))
        attention, stack = layers[0].attention, layers[0].stack
        self._stack = Stack(
            self._layers,
            len(layers),
            stack.hidden_size,
            stack.feed_forward_size,
            attention.local.groups,
            attention.local.queries,
            stack.head_size,
            attention.rotary_size,
            layers[0].is_parallel,
        )
        self._step = Step()
        self._workspace = torch.empty(0)

    def prepare(self, memory: Tensor) -> None:
        """Asks for large pages for keys and values, before anything is stored."""
        self._library.use_huge_pages(memory.data_ptr(), memory.nbytes)

    def __call__(
        self, hidden: Tensor, memory: Tensor, length: int, rotary: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Runs new positions through all layers, and stores their keys and values.

        Args:
            hidden: [B, T, D].
            memory: keys and values [layers, 2, B, groups, capacity, head size].
            length: positions that it holds.
            rotary: cosine and signed sine [capacity, 1, 1, rotary size].
            mask: bool [B or 1, 1, T or 1, length + T], True = may attend; None: causal.

        Returns:
            Hidden states [B, D] of the last position.
        """
        hidden = hidden.contiguous()
        sequences, positions, width = hidden.shape
        result = hidden.new_empty(sequences, width)
        step = self._step
        step.hidden, step.result = hidden.data_ptr(), result.data_ptr()
        step.cache, step.capacity, step.length = memory.data_ptr(), memory.shape[4], length
        step.cosine, step.sine = rotary[0].data_ptr(), rotary[1].data_ptr()
        step.sequences, step.positions = sequences, positions
        step.mask = None
        if mask is not None:
            mask = mask.expand(sequences, 1, positions, length + positions)
            step.mask, step.mask_of_sequence, step.mask_of_position = mask.data_ptr(), mask.stride(0), mask.stride(2)
        threads = torch.get_num_threads()
        needed = self._library.workspace_size(self._stack, step, threads)
        if needed > len(self._workspace):
            self._workspace = torch.empty(needed)
        step.workspace = self._workspace.data_ptr()
        self._library.run_stack(self._stack, step, threads)
        return result

    def _layer(self, layer: DecoderLayer) -> Layer:
        holder, attention, feed_forward = self._holder, layer.attention, layer.feed_forward
        return Layer(
            holder.norm(layer.attention_norm),
            holder.norm(layer.feed_forward_norm),
            Norm() if attention.query_norm is None else holder.norm(attention.query_norm),
            Norm() if attention.key_norm is None else holder.norm(attention.key_norm),
            holder.matrix(attention.query_key_value),
            holder.matrix(attention.dense),
            Matrix() if feed_forward.gate is None else holder.matrix(feed_forward.gate),
            holder.matrix(feed_forward.expand),
            holder.matrix(feed_forward.contract),
        )


def stack_kernel(layers: Sequence[DecoderLayer]) -> StackKernel | None:
    """The kernel of a decoder, if there is one for it."""
    library = _kernels_for_module(layers[0].attention_norm)
    if library is None or isinstance(layers[0], CrossAttentionLayer):
        return None
    return StackKernel(library, layers)


class NormedLinearKernel:
    """A norm and a linear layer behind it.

    Args:
        library: computes them.
        norm: LayerNorm or RMSNorm.
        linear: torch's or Megatron-core's.
    """

    def __init__(self, library: Library, norm: nn.Module, linear: nn.Module) -> None:
        self._library = library
        self._holder = _Holder(library, [linear])
        self._norm, self._matrix = self._holder.norm(norm), self._holder.matrix(linear)
        self._result = torch.empty(0, 0)

    def release(self) -> None:
        """Gives the memory of results back."""
        self._result = torch.empty(0, 0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps [B, D] to [B, outputs]; the next call overwrites them, since new memory costs more than the product."""
        hidden = hidden.contiguous()
        rows = len(hidden)
        if rows != len(self._result):
            self._result = self._library.memory(rows * self._matrix.outputs).view(rows, -1)
        result = self._result
        self._library.run_normed_linear(
            self._norm,
            self._matrix,
            hidden.data_ptr(),
            rows,
            result.data_ptr(),
            torch.get_num_threads(),
        )
        return result


def normed_linear_kernel(norm: nn.Module, linear: nn.Module) -> NormedLinearKernel | None:
    """The kernel of a norm and a linear layer, if there is one for them."""
    library = _kernels_for_module(linear)
    return None if library is None else NormedLinearKernel(library, norm, linear)


def find_most_likely(library: Library, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of logits [B, V] and its place; of equal ones the first. NaN is the largest of all."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, columns = logits.shape
    highest, places = logits.new_empty(rows), torch.empty(rows, dtype=torch.int64)
    library.find_most_likely(
        logits.data_ptr(),
        rows,
        columns,
        logits.stride(0),
        highest.data_ptr(),
        places.data_ptr(),
        torch.get_num_threads(),
    )
    return highest, places
