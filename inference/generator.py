"""Generates token sequences from prompts."""

import warnings
from collections.abc import Sequence

import torch

from inference.engine import BlockEngine, Engine, VanillaEngine
from inference.errors import InferenceError
from inference.prompts import check_prompts, pad_prompts
from inference.sampling import Sampler, SamplingConfig
from parallel.cpu_adaptation import compute_device
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

    Raises:
        InferenceError: the stage is of another layout, or an argument does not fit the model.
    """

    def __init__(self, stage: Stage, pad_id: int, vocab_size: int | None = None) -> None:
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
        self._warned = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig | None = None,
        eos_id: int | None = None,
    ) -> list[list[int]]:
        """Continues each prompt; what a sequence becomes does not depend on its neighbours.

        Args:
            prompts: token ids, at least one per prompt, of any lengths.
            max_new_tokens: tokens to generate per prompt.
            sampling: how tokens are chosen; greedy by default.
            eos_id: a sequence ends with this token; None: none ends early.

        Returns:
            The new tokens of each prompt: exactly max_new_tokens, or fewer and eos_id as the last.

        Raises:
            InferenceError: a prompt is empty or holds an unknown id, or max_new_tokens is negative.
        """
        if max_new_tokens < 0:
            raise InferenceError(f"max_new_tokens={max_new_tokens} is negative; use 0 or more")
        check_prompts(prompts, self.stage.model_config.vocab_size)
        results: list[list[int]] = [[] for _ in prompts]
        if not prompts or max_new_tokens == 0:
            return results
        self._warn_if_long(max(len(prompt) for prompt in prompts) + max_new_tokens)
        # Not inference_mode: the rotary tables made here are cached, and training could not use them.
        with torch.no_grad():
            self._fill(results, prompts, max_new_tokens, sampling or SamplingConfig(), eos_id)
        return results

    def _fill(
        self,
        results: list[list[int]],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig,
        eos_id: int | None,
    ) -> None:
        engine = self._engine()
        sampler = Sampler(sampling, len(prompts))
        logits = engine.process_prompts(
            pad_prompts(prompts, self.stage.model_config.unit_length, self.pad_id, compute_device()), max_new_tokens
        )
        running = set(range(len(prompts)))
        for count in range(1, max_new_tokens + 1):
            tokens = sampler.choose(logits[:, : self.vocab_size])
            chosen = tokens.tolist()
            for row in running:
                results[row].append(chosen[row])
            running = {row for row in running if chosen[row] != eos_id}
            if not running or count == max_new_tokens:
                return
            logits = engine.append(tokens)

    def _engine(self) -> Engine:
        return BlockEngine(self.stage) if self.stage.model_config.is_block else VanillaEngine(self.stage)

    def _warn_if_long(self, length: int) -> None:
        trained = self.stage.model_config.sequence_length
        if length > trained and not self._warned:
            self._warned = True
            warnings.warn(
                f"prompt and new tokens are up to {length} together, the model was trained on model.sequence_length="
                f"{trained}; expect worse text beyond that",
                stacklevel=3,
            )
