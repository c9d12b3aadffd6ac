"""Tasks of lm-evaluation-harness during training: joins a run's settings, the harness and the trainer's model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.config import RunConfig

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from evaluation.harness.loading import LoadedTask
    from evaluation.padding import Padding
    from train.evaluator import Metrics, Run


@dataclass(frozen=True)
class TaskEvaluation:
    """A train.evaluator.Evaluator.

    Attributes:
        config: the run.
        tasks: with their documents.
        tokenizer: of the run's data.
        padding: how texts lie in blocks; None for vanilla models.
    """

    config: RunConfig
    tasks: "list[LoadedTask]"
    tokenizer: "Tokenizer"
    padding: "Padding | None"

    def evaluate(self, run: "Run") -> "Metrics":
        """Runs all tasks; see Evaluator. A forward pass has no more tokens than one of training."""
        from evaluation.harness.adapter import HarnessModel
        from evaluation.harness.running import run_task
        from evaluation.sharded_scorer import ShardedScorer
        from parallel.topology import coordinates

        config = self.config
        tokens = config.train.micro_batch_size * config.model.sequence_length
        scorer = ShardedScorer(
            run, config.model, config.parallel, coordinates(), self.tokenizer.eos_id, self.padding, tokens
        )
        model = HarnessModel(scorer, self.tokenizer, shows_progress=False)
        limit = config.tasks.limit
        return {task.name: run_task(model, task, limit, self.padding).scalars() for task in self.tasks}


def prepare_tasks(config: RunConfig) -> TaskEvaluation | None:
    """Loads the tasks of a run and checks all that can be checked without its model.

    Returns:
        What runs them; None if there are none.

    Raises:
        ConfigurationError: a name is unknown, a task generates text, lm-eval is missing, or the padding or the
            tokenizer does not fit the model.
        DataError: a file is missing or wrong, or documents cannot be fetched.
    """
    if not config.tasks.names:
        return None
    # Imported here: a process's environment must be set before, and most runs need none of it.
    from data.streaming.corpus_tokenizer import tokenizer_file
    from data.tokenizer import load_tokenizer
    from evaluation.harness.loading import RUN_SETTINGS, check_scored, load_tasks
    from evaluation.padding import choose_padding
    from parallel.errors import ConfigurationError

    padding = choose_padding(config.tasks.padding, config.model, config.data, RUN_SETTINGS.padding)
    tokenizer = load_tokenizer(tokenizer_file(config.data))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigurationError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, more than model.vocab_size="
            f"{config.model.vocab_size}; set that to at least {tokenizer.vocab_size}"
        )
    tasks = load_tasks(tuple(dict.fromkeys(config.tasks.names)), config.tasks.data, called=RUN_SETTINGS)
    check_scored(tasks, RUN_SETTINGS)
    return TaskEvaluation(config, tasks, tokenizer, padding)
