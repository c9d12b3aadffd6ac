"""The model during generation: prompts in, then one token per sequence at a time.

An engine holds the state of one batch. Every step computes from the token ids again; what a cache would keep is the
hidden states behind `process_prompts`, the block step and the token step.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from parallel.inputs import MicroBatch, ModelInputs, prepare_inputs
from parallel.pieces import OutputHead
from parallel.stage import Stage
from parallel.structure import piece_names


class Engine(ABC):
    """What the generation loop asks of a model; B sequences, V vocabulary."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.config = stage.model_config
        self.names = piece_names(self.config)
        output = stage.piece(self.names[-1])
        assert isinstance(output, OutputHead)
        self.output = output

    @abstractmethod
    def process_prompts(self, batch: MicroBatch) -> Tensor:
        """Starts a batch, padded on the left to whole blocks; returns logits [B, V] of the first new token."""

    @abstractmethod
    def append(self, tokens: Tensor) -> Tensor:
        """Appends a token [B] to each sequence; returns logits [B, V] of the token after it."""


def _extended(sequence: MicroBatch, tokens: Tensor) -> MicroBatch:
    """The sequences with real tokens [B, n] appended."""
    real = torch.ones_like(tokens, dtype=torch.bool)
    return MicroBatch(torch.cat((sequence.token_ids, tokens), dim=1), torch.cat((sequence.mask, real), dim=1))


class BlockEngine(Engine):
    """Block Transformer: a block step for each block, and inside it a token step for each token."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        first_local = self.names.index("token_decoder.input")
        self._block_names = self.names[:first_local]
        self._token_names = self.names[first_local:-1]
        self._sequence: MicroBatch
        self._context: Tensor
        self._block: Tensor

    def process_prompts(self, batch: MicroBatch) -> Tensor:
        """Runs the block decoder over the prompts; see Engine."""
        self._start_block(batch)
        return self._token_step()

    def append(self, tokens: Tensor) -> Tensor:
        """Adds to the current block, and starts the next one when it is full; see Engine."""
        self._block = torch.cat((self._block, tokens[:, None]), dim=1)
        if self._block.shape[1] == self.config.block_length:
            self._start_block(_extended(self._sequence, self._block))
        return self._token_step()

    def _start_block(self, sequence: MicroBatch) -> None:
        self._sequence = sequence
        self._context = self._block_step()
        self._block = sequence.token_ids[:, :0]

    def _block_step(self) -> Tensor:
        """Context embedding [1, B, D] of the last block."""
        inputs = prepare_inputs(self.config, self._sequence)
        return self.stage.run(None, inputs, self._block_names)[-1:]

    def _token_step(self) -> Tensor:
        """Logits [B, V] of the next token, from the context embedding and the tokens of the current block."""
        # The token decoder's input leaves out the last target, which here is the token to be found.
        targets = torch.nn.functional.pad(self._block, (0, 1))
        inputs = ModelInputs(
            token_ids=targets,
            global_mask=None,
            local_mask=None,
            targets=targets,
            target_mask=torch.ones_like(targets, dtype=torch.bool),
            token_mask=torch.ones_like(targets, dtype=torch.bool),
        )
        hidden = self.stage.run(self._context, inputs, self._token_names)
        return self.output.logits_of(hidden[:, self.config.leading_positions - 1 + self._block.shape[1]])


class VanillaEngine(Engine):
    """GPT-NeoX baseline: a token step for each token."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._sequence: MicroBatch

    def process_prompts(self, batch: MicroBatch) -> Tensor:
        """Runs the decoder over the prompts; see Engine."""
        self._sequence = batch
        return self._token_step()

    def append(self, tokens: Tensor) -> Tensor:
        """Adds a token; see Engine."""
        self._sequence = _extended(self._sequence, tokens[:, None])
        return self._token_step()

    def _token_step(self) -> Tensor:
        """Logits [B, V] of the next token."""
        inputs = prepare_inputs(self.config, self._sequence)
        return self.output.logits_of(self.stage.run(None, inputs, self.names[:-1])[-1])
