"""All evaluations by name: our own, and those of lm-evaluation-harness.

An evaluation has two halves. Preparing it, before the model is loaded, reads and checks all that the user has given;
what comes out of that is called with the loaded model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.trained_model import TrainedModel
from data.streaming.stream import SequenceStream
from data.tokenizer import Tokenizer
from evaluation.documents import DocumentChunks, chunk_length, read_chunks
from evaluation.harness.loading import LoadedTask, load_tasks
from evaluation.harness.running import run_task
from evaluation.language_modeling import evaluate_language_modeling
from evaluation.needle.evaluate import DEFAULT_SAMPLES, prepare_needle_test
from evaluation.padding import Padding, choose_padding
from evaluation.positions import evaluate_positions
from evaluation.probes.attention import probe_attention
from evaluation.probes.context_embeddings import check_context_embeddings, probe_context_embeddings
from evaluation.result import EvaluationResult
from evaluation.scoring import Scorer
from evaluation.stage_scorer import DEFAULT_BATCH_TOKENS, StageScorer
from evaluation.text_generation import TextGenerator
from inference.generator import Generator
from inference.tokenizer_choice import tokenizer_of
from parallel.errors import ConfigurationError
from parallel.stage import Stage

if TYPE_CHECKING:
    from evaluation.harness.adapter import HarnessModel

# Means over attention and nearest tokens need less text than losses.
PROBED_CHUNKS = 32


@dataclass(frozen=True)
class EvaluationOptions:
    """What the user may choose; each evaluation reads its own.

    Attributes:
        sequences: `validation`: at most so many sequences.
        batch_size: `validation`: sequences per forward pass.
        skip_tokens: `validation`: so many tokens at the start of each sequence are no targets.
        batch_tokens: tokens per forward pass of all other evaluations.
        limit: lm-eval: documents of each task, at most; None: all.
        padding: lm-eval: one of PADDINGS.
        task_data: lm-eval: folder of local files; None: the tasks' data are downloaded.
        tokenizer: Tokenizer file instead of the recorded one.
        documents: `positions`, `attention`, `context_embeddings`: text, in whole documents.
        context_length: the same: tokens of the chunks that documents are cut into; None: the model's sequence length.
        chunks: the same: at most so many of them; None: all for `positions`, some for the others.
        haystack: `needle`: text that needles are hidden in.
        needle_lengths: `needle`: tokens of the contexts; None: the usual ones up to the model's sequence length.
        needle_samples: `needle`: for each prompt, length and depth.
        needle_seed: `needle`: of the samples.
    """

    sequences: int = 256
    batch_size: int = 16
    skip_tokens: int = 0
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    limit: int | None = None
    padding: str = "auto"
    task_data: Path | None = None
    tokenizer: Path | None = None
    documents: Path | None = None
    context_length: int | None = None
    chunks: int | None = None
    haystack: Path | None = None
    needle_lengths: Sequence[int] | None = None
    needle_samples: int = DEFAULT_SAMPLES
    needle_seed: int = 0


@dataclass(frozen=True)
class EvaluationRequest:
    """A trained model, not loaded yet, and the options."""

    trained: TrainedModel
    options: EvaluationOptions

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises DataError or InferenceError without one that fits."""
        return tokenizer_of(self.trained.model, self.trained.data, self.options.tokenizer or self.trained.tokenizer)

    def check_tokenizer(self) -> None:
        """Finds the tokenizer now rather than later; raises as it does."""
        assert self.tokenizer is not None

    @cached_property
    def probed_chunks(self) -> DocumentChunks:
        """Text for the probes; raises as prepare_positions."""
        return _chunks(self, self.options.chunks or PROBED_CHUNKS)

    @cached_property
    def padding(self) -> Padding | None:
        """How texts lie in blocks; raises ConfigurationError."""
        return choose_padding(self.options.padding, self.trained.model, self.trained.data)


@dataclass(frozen=True)
class LoadedModel:
    """The model of a request in memory, and what works with it."""

    request: EvaluationRequest
    stage: Stage

    @cached_property
    def scorer(self) -> Scorer:
        """Scores texts."""
        request = self.request
        return StageScorer(self.stage, request.tokenizer.eos_id, request.padding, request.options.batch_tokens)

    @cached_property
    def generator(self) -> Generator:
        """Continues prompts."""
        tokenizer = self.request.tokenizer
        return Generator(self.stage, tokenizer.eos_id, tokenizer.vocab_size)

    @cached_property
    def text_generator(self) -> TextGenerator:
        """Continues texts."""
        return TextGenerator(self.generator, self.request.tokenizer, self.request.options.batch_tokens)

    @cached_property
    def harness(self) -> "HarnessModel":
        """What lm-eval sees of it; lm-eval must be installed."""
        from evaluation.harness.adapter import HarnessModel

        return HarnessModel(self.scorer, self.request.tokenizer, lambda: self.text_generator)


Evaluation = Callable[[LoadedModel], EvaluationResult]
Preparation = Callable[[EvaluationRequest], Evaluation]


def prepare_validation(request: EvaluationRequest) -> Evaluation:
    """Loss on the held-out split of the model's own data.

    Raises:
        ConfigurationError: The model was imported.
        DataError: The data cannot be read, or are too few.
    """
    trained, options = request.trained, request.options
    if trained.data is None:
        raise ConfigurationError(
            f"{trained.folder} was imported, so it has no validation split of its own; name other evaluations with "
            "--tasks, or evaluate a run of tools/pretrain.py"
        )
    stream = SequenceStream(
        trained.data,
        "validation",
        block_length=trained.model.unit_length,
        sequence_length=trained.model.sequence_length,
    )
    return lambda model: evaluate_language_modeling(
        model.stage, stream, options.sequences, options.batch_size, options.skip_tokens
    )


def prepare_positions(request: EvaluationRequest) -> Evaluation:
    """Loss by position over long documents.

    Raises:
        ConfigurationError: There are no documents, or the context length does not fit the model.
        DataError: The documents cannot be read, or none is long enough.
    """
    chunks = _chunks(request, request.options.chunks)
    return lambda model: evaluate_positions(model.stage, chunks, request.options.batch_tokens)


def prepare_needle(request: EvaluationRequest) -> Evaluation:
    """Needle in a haystack.

    Raises:
        ConfigurationError: There is no haystack, or a context is too short.
        DataError: The haystack cannot be read.
    """
    options = request.options
    if options.haystack is None:
        raise ConfigurationError("evaluation needle needs --haystack PATH: a file or folder of text to hide needles in")
    test = prepare_needle_test(
        request.trained.model,
        request.tokenizer,
        options.haystack,
        options.needle_lengths,
        options.needle_samples,
        options.needle_seed,
    )
    return lambda model: test.run(model.generator, options.batch_tokens)


def prepare_attention(request: EvaluationRequest) -> Evaluation:
    """Attention maps; raises as prepare_positions."""
    chunks = request.probed_chunks
    return lambda model: probe_attention(model.stage, chunks, request.options.batch_tokens)


def prepare_context_embeddings(request: EvaluationRequest) -> Evaluation:
    """Tokens nearest to context embeddings; raises as prepare_positions, and ConfigurationError for other models."""
    check_context_embeddings(request.trained.model)
    chunks = request.probed_chunks
    return lambda model: probe_context_embeddings(model.stage, request.tokenizer, chunks, request.options.batch_tokens)


def _chunks(request: EvaluationRequest, limit: int | None) -> DocumentChunks:
    """The documents of a request, in at most so many chunks."""
    options = request.options
    if options.documents is None:
        raise ConfigurationError(
            "evaluations of positions, attention and context_embeddings need --documents PATH: a file or folder of "
            "long documents, such as whole books"
        )
    length = chunk_length(request.trained.model, options.context_length, "--context-length")
    return read_chunks(options.documents, "--documents", request.tokenizer, length, limit)


OWN_EVALUATIONS: dict[str, Preparation] = {
    "validation": prepare_validation,
    "positions": prepare_positions,
    "needle": prepare_needle,
    "attention": prepare_attention,
    "context_embeddings": prepare_context_embeddings,
}


def prepare_evaluations(request: EvaluationRequest, names: Sequence[str]) -> list[Evaluation]:
    """Checks everything that can be checked without the model.

    Args:
        request: What to evaluate, and how.
        names: Names of our evaluations, or of tasks of lm-eval; one that comes twice counts once.

    Returns:
        The evaluations, in the order of their names.

    Raises:
        ConfigurationError: A name is unknown, lm-eval is missing, or an option is impossible.
        DataError: A file is missing or wrong.
        InferenceError: The model has no tokenizer, or the given one does not fit.
    """
    tasks = [name for name in dict.fromkeys(names) if name not in OWN_EVALUATIONS]
    evaluations = _prepare_tasks(request, tasks) if tasks else {}
    evaluations |= {name: OWN_EVALUATIONS[name](request) for name in names if name in OWN_EVALUATIONS}
    return [evaluations[name] for name in dict.fromkeys(names)]


def _prepare_tasks(request: EvaluationRequest, names: Sequence[str]) -> dict[str, Evaluation]:
    """Tasks of lm-eval by name."""
    padding, limit = request.padding, request.options.limit
    request.check_tokenizer()

    def evaluation(task: LoadedTask) -> Evaluation:
        return lambda model: run_task(model.harness, task, limit, padding)

    tasks = load_tasks(names, request.options.task_data, tuple(OWN_EVALUATIONS))
    return {task.name: evaluation(task) for task in tasks}
