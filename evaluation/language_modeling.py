"""How well a model predicts held-out text, and whether its block decoder is used.

Two yardsticks stand beside the loss: the unigram entropy of the same target tokens (what a model without any context
could reach at best), and the loss when every sequence is given the context embeddings of another one.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from data.errors import DataError
from data.streaming.stream import SequenceStream
from evaluation.result import EvaluationResult
from parallel.inputs import MicroBatch, ModelInputs, prepare_inputs, target_mask
from parallel.schedule import LossSums, loss_sums
from parallel.stage import Stage


@dataclass(frozen=True)
class LanguageModeling(EvaluationResult):
    """Results over the same valid targets; nats per token.

    Attributes:
        loss: cross entropy.
        loss_by_position: the same by position in the block, from its first token.
        unigram_entropy: entropy of the targets' own frequencies.
        shuffled_context_loss: cross entropy with the context embeddings of another sequence; None for vanilla models.
        targets: number of valid targets.
    """

    name = "validation"

    loss: float
    loss_by_position: tuple[float, ...]
    unigram_entropy: float
    shuffled_context_loss: float | None
    targets: int

    def lines(self) -> list[str]:
        """The results for a person."""
        gain = self.unigram_entropy - self.loss
        side = "below" if gain >= 0 else "above"
        lines = [
            f"validation loss        {self.loss:.4f} nats per token over {self.targets:,} tokens",
            f"unigram entropy        {self.unigram_entropy:.4f} (the loss is {abs(gain):.4f} {side} it)",
        ]
        if self.shuffled_context_loss is not None:
            harm = self.shuffled_context_loss - self.loss
            positions = " ".join(f"{value:.4f}" for value in self.loss_by_position)
            lines += [
                f"with shuffled contexts {self.shuffled_context_loss:.4f} ({harm:+.4f}, the block decoder's worth)",
                f"by position in block   {positions}",
            ]
        return lines

    def scalars(self) -> dict[str, float]:
        """The losses in nats per token; positions count from 1."""
        scalars = {"loss": self.loss, "unigram_entropy": self.unigram_entropy}
        if self.shuffled_context_loss is not None:
            scalars["shuffled_context_loss"] = self.shuffled_context_loss
            scalars |= {f"loss_by_position/{i}": value for i, value in enumerate(self.loss_by_position, start=1)}
        return scalars

    def to_json(self) -> dict[str, object]:
        """The attributes by name."""
        return asdict(self)


@torch.no_grad()
def evaluate_language_modeling(
    stage: Stage, stream: SequenceStream, num_sequences: int, batch_size: int, skip_tokens: int = 0
) -> LanguageModeling:
    """Evaluates an unpipelined model on the first sequences of a stream.

    Args:
        stage: the whole model.
        stream: validation sequences.
        num_sequences: at most this many, at most one epoch.
        batch_size: sequences per forward pass; at least 2, so that contexts can be exchanged.
        skip_tokens: this many tokens at the start of each sequence are no targets.

    Raises:
        DataError: there is not one whole batch, or no target.
    """
    available = min(num_sequences, stream.sequences_per_epoch)
    if not 2 <= batch_size <= available:
        raise DataError(
            f"batch size {batch_size} must be at least 2 and at most the {available} sequences that are evaluated; "
            "change --batch-size or --sequences"
        )
    length = stream.sequence_length
    if not 0 <= skip_tokens < length:
        raise DataError(
            f"skipping {skip_tokens} tokens of sequences of {length} leaves no target; change --skip-tokens"
        )
    config = stage.model_config
    device = next(stage.parameters()).device
    normal, shuffled = LossSums.zero(config, device), LossSums.zero(config, device)
    frequencies = torch.zeros(config.vocab_size, dtype=torch.int64, device=device)
    for batch in _batches(stream, num_sequences, batch_size, device):
        inputs = prepare_inputs(config, batch)
        counted = target_mask(config, replace(batch, mask=batch.mask & _from(skip_tokens, batch.mask)))
        normal += loss_sums(config, stage.run(None, inputs), counted)
        frequencies += torch.bincount(inputs.targets[counted], minlength=config.vocab_size)
        if config.is_block:
            shuffled += loss_sums(config, _run_with_shuffled_contexts(stage, inputs), counted)
    return LanguageModeling(
        loss=_mean(normal),
        loss_by_position=tuple((normal.loss / normal.count).tolist()),
        unigram_entropy=unigram_entropy(frequencies),
        shuffled_context_loss=_mean(shuffled) if config.is_block else None,
        targets=int(normal.count.sum()),
    )


def unigram_entropy(frequencies: Tensor) -> float:
    """Entropy in nats of token counts [V]."""
    counts = frequencies[frequencies > 0].double()
    total = float(counts.sum())
    return math.log(total) - float((counts * counts.log()).sum()) / total


def _from(first: int, mask: Tensor) -> Tensor:
    """Which columns of a mask [B, S] stand at or after the first one, as [S]."""
    return torch.arange(mask.shape[1], device=mask.device) >= first


def _run_with_shuffled_contexts(stage: Stage, inputs: ModelInputs) -> Tensor:
    """Token losses when each sequence gets the context embeddings of its neighbour in the batch."""
    hidden: Tensor | None = None
    for name in stage.names:
        if name == "token_decoder.input":
            assert hidden is not None
            hidden = hidden.roll(1, dims=1)
        hidden = stage.piece(name)(hidden, inputs)
    assert hidden is not None
    return hidden


def _batches(stream: SequenceStream, num_sequences: int, batch_size: int, device: torch.device) -> Iterator[MicroBatch]:
    """Whole sequences in order, in batches of equal size; what does not fill a batch is left out."""
    stop = min(num_sequences, stream.sequences_per_epoch)
    for start in range(0, stop - batch_size + 1, batch_size):
        sequences = stream.read(start, batch_size)
        documents = None if sequences.documents is None else torch.from_numpy(sequences.documents).to(device)
        token_ids, mask = torch.from_numpy(sequences.token_ids), torch.from_numpy(sequences.mask)
        yield MicroBatch(token_ids.to(device), mask.to(device), documents)


def _mean(sums: LossSums) -> float:
    return float(sums.loss.sum() / sums.count.sum())
