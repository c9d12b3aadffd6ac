"""Generates token sequences from prompts."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from inference.engine import BlockEngine, Engine, VanillaEngine
from inference.errors import InferenceError
from inference.memory import explained_memory_errors
from inference.prompts import check_prompts, pad_prompts
from inference.sampling import Sampler, SamplingConfig
from inference.sequences import RunningSequence, start_sequences
from inference.unit_graphs import UnitGraphs
from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch
from parallel.stage import Stage
from parallel.structure import piece_names


class Generator:
    """Generates with an unpipelined model; under tensor parallelism all its ranks make the same calls together.

    Args:
        stage: the whole model, built without sequence parallelism.
        pad_id: what training filled padded slots with (the end-of-text id): a block that holds the start of a prompt
            embeds it.
        vocab_size: tokens of the tokenizer; ids from it on only pad the tables and are never generated. By default all
            of the model's.
        graphs: whether to decode in recorded CUDA graphs; by default on a GPU without tensor parallelism.

    Raises:
        InferenceError: the stage is of another layout, or an argument does not fit the model.
    """

    def __init__(self, stage: Stage, pad_id: int, vocab_size: int | None = None, graphs: bool | None = None) -> None:
        config = stage.model_config
        if stage.names != piece_names(config):
            raise InferenceError("generation needs the whole model in one pipeline stage; build it with pipeline=1")
        if stage.config.sequence_parallel:
            raise InferenceError("generation cannot split sequences; build the model with sequence_parallel=false")
        self.stage = stage
        self.pad_id = pad_id
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        for name, value, highest in (
            ("pad_id", pad_id, config.vocab_size - 1),
            ("vocab_size", self.vocab_size, config.vocab_size),
        ):
            if not 0 <= value <= highest:
                raise InferenceError(
                    f"{name}={value} does not fit the model's vocabulary of {config.vocab_size}; "
                    "use the tokenizer the model was trained with"
                )
        is_alone = stage.config.tensor_model_parallel_size == 1
        self._uses_graphs = compute_device().type == "cuda" and is_alone if graphs is None else graphs
        self._warned = False
        self._cache_bytes = 0
        self._engine: Engine = BlockEngine(stage) if config.is_block else VanillaEngine(stage)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        eos_id: int | None = None,
        on_token: Callable[[int, int], object] | None = None,
    ) -> list[list[int]]:
        """Continues each prompt; what a sequence becomes does not depend on its neighbours.

        Args:
            prompts: token ids, at least one per prompt, of any lengths.
            max_new_tokens: tokens to generate per prompt.
            sampling: how tokens are chosen; greedy by default. One for all: each prompt draws other numbers, by its
                place among them. Or one for each prompt: then its seed alone decides.
            eos_id: a sequence ends with this token; None: none ends early.
            on_token: called with the number of the prompt and each token as soon as it is known; the sequence ends with
                this token if it answers True.

        Returns:
            The new tokens of each prompt: exactly max_new_tokens, or fewer, if eos_id or `on_token` ended them.

        Raises:
            InferenceError: a prompt is empty or holds an unknown id, or max_new_tokens is negative.
        """
        if max_new_tokens < 0:
            raise InferenceError(f"max_new_tokens={max_new_tokens} is negative; use 0 or more")
        check_prompts(prompts, self.stage.model_config.vocab_size)
        sequences = start_sequences(prompts, max_new_tokens, sampling or SamplingConfig(), eos_id, on_token)
        if sequences and max_new_tokens:
            self._warn_if_long(max(len(prompt) for prompt in prompts) + max_new_tokens)
            # Not inference_mode: the rotary tables made here are cached, and training could not use them.
            what, advice = f"{len(sequences)} sequences at a time", "generate fewer at a time, or fewer tokens"
            with torch.no_grad(), explained_memory_errors(what, advice):
                try:
                    self._continue(sequences, max_new_tokens)
                finally:
                    self._release()
        return [sequence.tokens for sequence in sequences]

    def instrument(self, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts a wrapper, which gets a name and the component, around each component of the model that is called."""
        self._engine.instrument(wrap)

    @property
    def cache_bytes(self) -> int:
        """Memory that the keys and values of the last batch take on this rank."""
        return self._cache_bytes

    def _release(self) -> None:
        """Gives the memory of the batch back: the next batch takes its own, and others want some in between."""
        self._cache_bytes = sum(cache.bytes for cache in self._engine.caches)
        self._engine.release()

    def _continue(self, sequences: list[RunningSequence], max_new_tokens: int) -> None:
        """Runs a batch until every sequence has ended; sequence i has slot i of the engine."""
        device = compute_device()
        sampler = Sampler([one.sampling for one in sequences], [one.numbers for one in sequences], device)
        batch = pad_prompts([one.prompt for one in sequences], self.stage.model_config.unit_length, self.pad_id, device)
        for tokens in self._tokens(batch, max_new_tokens, sampler):
            for column in tokens.t().tolist():
                for sequence, token in zip(sequences, column, strict=True):
                    sequence.add(token)
            if all(sequence.ended for sequence in sequences):
                return

    def _tokens(self, batch: MicroBatch, max_new_tokens: int, sampler: Sampler) -> Iterator[Tensor]:
        """New tokens [B, count], as many at a time as are made at once, without end."""
        engine, unit = self._engine, self._engine.unit_tokens
        # A unit is made whole, even if the last tokens of the last one are not wanted.
        room = -(-max_new_tokens // unit) * unit if self._uses_graphs else max_new_tokens
        tokens = [sampler.choose(engine.process_prompts(batch, room)[:, : self.vocab_size])]
        yield tokens[-1][:, None]
        while not self._uses_graphs or len(tokens) < unit:
            tokens = [*tokens[-unit:], sampler.choose(engine.append(tokens[-1])[:, : self.vocab_size])]
            yield tokens[-1][:, None]
        graphs = UnitGraphs(engine, sampler, torch.stack(tokens, dim=1), self.vocab_size)
        while True:
            yield graphs.next()

    def _warn_if_long(self, length: int) -> None:
        trained = self.stage.model_config.sequence_length
        if length > trained and not self._warned:
            self._warned = True
            warnings.warn(
                f"prompt and new tokens are up to {length} together, the model was trained on model.sequence_length="
                f"{trained}; expect worse text beyond that",
                stacklevel=3,
            )
