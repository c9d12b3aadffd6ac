"""A pipeline stage: a contiguous slice of the model's pieces as one module."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.profiler import record_function

from parallel.block_parallel import (
    mark_replicated,
    own_blocks,
    own_inputs,
    undivided,
    with_gathered_input,
)
from parallel.checkpointing import Policy
from parallel.config import ModelConfig, ParallelConfig
from parallel.costs import pipeline_split
from parallel.cpu_adaptation import compute_device
from parallel.initialization import initialize_weights
from parallel.inputs import MicroBatch, ModelInputs, prepare_inputs
from parallel.output_head import OutputHead, tie_head
from parallel.pieces import build_piece
from parallel.structure import holds_own_blocks
from parallel.topology import coordinates


def megatron_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-core's settings for the parallel layers and the pipeline schedule."""
    widest = max(model.stacks, key=lambda stack: stack.hidden_size)
    return TransformerConfig(
        num_layers=sum(stack.num_layers for stack in model.stacks),
        hidden_size=widest.hidden_size,
        num_attention_heads=widest.num_attention_heads,
        ffn_hidden_size=widest.feed_forward_size,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,
        cuda_graph_scope=[],
    )


class Stage(nn.Module):
    """The pieces of one pipeline stage.

    Parameter names are global: they do not depend on the layout. `config`, `model_type` and `set_input_tensor` are
    what Megatron-core's schedules ask of a model.

    Args:
        model: the whole model.
        parallel: the layout.
        dtype: of parameters and activations.
        pipeline_rank: which stage; None: this process's.
        policies: activation checkpointing of decoder layers by piece, instead of the layout's; a budget needs it.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        dtype: torch.dtype = torch.float32,
        pipeline_rank: int | None = None,
        policies: Mapping[str, Policy] | None = None,
    ) -> None:
        super().__init__()
        rank = coordinates().pipeline_rank if pipeline_rank is None else pipeline_rank
        self.model_config = model
        self.config = megatron_config(model, parallel, dtype)
        self.block_parallel = parallel.block_parallel
        self.model_type = ModelType.encoder_or_decoder
        self.names = [cost.name for cost in pipeline_split(model, parallel.pipeline)[rank]]
        for name in self.names:
            _register(self, name, self._build(name, _policy(name, parallel, policies)))
        if model.tied_pieces and model.tied_pieces[1] in self.names:
            first, last = model.tied_pieces
            tie_head(self.piece(last), self.piece(first))
        self._input: Tensor | None = None

    def _build(self, name: str, policy: Policy) -> nn.Module:
        megatron = self.config
        if self.block_parallel and holds_own_blocks(name):
            piece = build_piece(name, self.model_config, undivided(megatron), policy)
            mark_replicated(piece)
            return piece
        if self.block_parallel and name == "token_decoder.output":
            megatron = with_gathered_input(megatron)
        return build_piece(name, self.model_config, megatron, policy)

    def piece(self, name: str) -> nn.Module:
        """The piece of that name."""
        return self.get_submodule(name)

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Receives the hidden states of the stage before (Megatron-core's protocol)."""
        self._input = tensors[0]

    def forward(self, batch: MicroBatch) -> Tensor:
        """Hidden states for the next stage, or, on the last stage, the cross entropy of each target (fp32)."""
        inputs = prepare_inputs(self.model_config, batch)
        return self.run(self._input, inputs)

    def run(self, hidden: Tensor | None, inputs: ModelInputs, names: Sequence[str] | None = None) -> Tensor:
        """Runs the named pieces of this stage, by default all, on prepared inputs."""
        own = own_inputs(inputs) if self.block_parallel else inputs
        for name in self.names if names is None else names:
            if name == "token_decoder.input" and self.block_parallel and not self.config.sequence_parallel:
                assert hidden is not None
                hidden = own_blocks(hidden)
            with record_function(name):
                hidden = self.piece(name)(hidden, own if holds_own_blocks(name) else inputs)
        assert hidden is not None
        return hidden

    def logits(self, batch: MicroBatch) -> Tensor:
        """Logits of every target, [N * B, L, V] (row n * B + b decodes block n + 1 of sequence b) or [S, B, V].

        Only for an unpipelined model.
        """
        output = self.piece(self.names[-1])
        assert isinstance(output, OutputHead)
        return output.logits(self.run(None, prepare_inputs(self.model_config, batch), self.names[:-1]))


def _policy(name: str, parallel: ParallelConfig, policies: Mapping[str, Policy] | None) -> Policy:
    """What a piece keeps for backward; only decoder layers heed it."""
    if policies is not None:
        return policies.get(name, "none")
    assert parallel.activation_checkpointing != "budget", "a budget needs the policies of parallel.planning.policies"
    return parallel.activation_checkpointing


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Registers a module under a dotted name, so that its parameter names come out global."""
    *parents, leaf = name.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(leaf, module)


def build_stage(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype = torch.float32, seed: int | None = 0, **place: Any
) -> Stage:
    """Builds this rank's stage on its device, with weights initialized from the seed (None: left uninitialized)."""
    stage = Stage(model, parallel, dtype, **place)
    if seed is not None:
        initialize_weights(stage, model, seed)
    stage.to(compute_device())
    return stage
