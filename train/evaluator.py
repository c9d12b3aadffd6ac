"""What evaluates a model during training: it is made elsewhere, and given the model as a function."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch
from parallel.schedule import LossSums
from train.metrics import agree
from train.requests import Request
from train.step import StepEngine

Run = Callable[[Sequence[MicroBatch]], list[Tensor]]
# By task and metric.
Metrics = dict[str, dict[str, float]]


class Evaluator(Protocol):
    """Evaluates the model that is being trained."""

    def evaluate(self, run: Run) -> Metrics:
        """Evaluates the model; called by all ranks together.

        Args:
            run: gives what the last piece says of this data-parallel rank's micro-batches, which are all of one shape;
                nothing on all but the last pipeline stage. All ranks call it equally often, with the same shapes. What
                it raises is not to be caught.

        Returns:
            The same on all ranks.
        """


class _Stopped(BaseException):
    """Leaves an evaluator, which may handle exceptions of its own."""


def run_evaluator(
    evaluator: Evaluator, engine: StepEngine, pending: Callable[[], Request]
) -> tuple[Metrics | None, Request]:
    """Runs an evaluator; called by all ranks together.

    Args:
        evaluator: what to run.
        engine: the model.
        pending: what this rank is asked for; asked before each call of the model.

    Returns:
        What the evaluator says, or None if any rank is asked to stop before it is done; and the most urgent request.
    """
    request = Request.NONE

    def run(micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        nonlocal request
        request = agree(LossSums.zero(engine.model, compute_device()), pending()).request
        if request >= Request.STOP:
            raise _Stopped
        return engine.token_scores(micro_batches)

    try:
        return evaluator.evaluate(run), request
    except _Stopped:
        return None, request
