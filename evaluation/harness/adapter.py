"""lm-evaluation-harness's view of a model."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data.preparation.progress import Progress
from data.tokenizer import Tokenizer
from evaluation.scoring import Score, ScoredText, Scorer
from evaluation.text_generation import Prompt, TextGenerator
from inference.sampling import sampling_config
from parallel.errors import ConfigurationError

# Arguments of generation that change nothing at these values.
NEUTRAL_ARGUMENTS = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "use_cache": True}
SAMPLING_ARGUMENTS = ("top_p", "top_k")


class HarnessModel(TemplateLM):
    """A model for lm-eval, with the conventions of lm-eval's own `hf` model.

    Texts are tokenized without special tokens, and text that spells one stays text, as in training. An empty context
    is the end of text. What is too long loses its beginning; see Scorer.max_length.

    Args:
        scorer: The model, for log-probabilities.
        tokenizer: The one it was trained with.
        generator: Gives the model for text; called at the first task that needs it. None: there is none.
        shows_progress: Whether to tell how far it is.

    Attributes:
        shows_progress: As given.
        unscored_continuations: So many lay within the first block, where nothing is predicted, and counted as 0.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        generator: Callable[[], TextGenerator] | None = None,
        shows_progress: bool = True,
    ) -> None:
        super().__init__()
        self.unscored_continuations = 0
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._generator = generator
        self.shows_progress = shows_progress

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self._tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """Tokens of the longest input."""
        return self._scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer."""
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; none is added."""
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation behind its context, and whether greedy generation gives it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([ScoredText(context, continuation) for _, context, continuation in requests])
        self.unscored_continuations += sum(not score.scored_tokens for score in scores)
        return [(score.log_probability, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text, behind an end of text and in windows as long as possible."""
        windows: list[ScoredText] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            for context, continuation in self._windows(request.args[0]):
                windows.append(ScoredText(context, continuation))
                owners.append(place)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._score(windows), strict=True):
            sums[owner] += score.log_probability
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continues each context up to one of its stop strings.

        Raises:
            ConfigurationError: The model only scores, or a task asks for what generation does not have.
        """
        if self._generator is None:
            raise ConfigurationError("this model scores texts and generates none; leave out tasks that generate")
        prompts = [self._prompt(*request.args) for request in requests]
        with Progress("generating", "texts", len(prompts), shown=self.shows_progress) as progress:
            return self._generator().generate(prompts, progress.update)

    def _score(self, texts: Sequence[ScoredText]) -> list[Score]:
        with Progress("scoring", "texts", len(texts), shown=self.shows_progress) as progress:
            return self._scorer.score(texts, progress.update)

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _prompt(self, context: str, arguments: dict[str, Any]) -> Prompt:
        known = dict(normalize_gen_kwargs(arguments))
        new_tokens = known.pop("max_gen_toks")
        stops = tuple(stop for stop in known.pop("until") if stop)
        temperature = known.pop("temperature", 0.0) if known.pop("do_sample") else 0.0
        sampling = {name: known.pop(name) for name in SAMPLING_ARGUMENTS if name in known}
        unknown = {name: value for name, value in known.items() if NEUTRAL_ARGUMENTS.get(name, object()) != value}
        unknown.pop("temperature", None)
        if unknown:
            raise ConfigurationError(f"the task generates with {unknown}, which is not offered here; leave it out")
        longest = self.max_length - new_tokens
        if longest < 1:
            raise ConfigurationError(
                f"the task generates {new_tokens} tokens, and the model reads {self.max_length}; leave it out"
            )
        token_ids = self.tok_encode(context)[-longest:] or [self.prefix_token_id]
        return Prompt(token_ids, new_tokens, stops, sampling_config(temperature=temperature, **sampling))
