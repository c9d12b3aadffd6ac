"""Loss on the validation split: the same sequences each time, spread over the data-parallel ranks."""

from collections.abc import Callable
from dataclasses import replace

from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch
from parallel.schedule import LossSums
from parallel.topology import Coordinates
from train.batches import micro_batch_rows, read_micro_batches
from train.config import RunConfig
from train.metrics import MeanLoss, agree, mean_loss
from train.requests import Request
from train.step import StepEngine
from train.streams import open_stream

ROUNDS_PER_CALL = 8  # micro-batches per rank and schedule call: enough to fill a pipeline, few enough for memory


class ValidationSet:
    """The first `validation.sequences` sequences of the validation split.

    Every rank must run the same number of micro-batches, so the set is cut to a multiple of micro-batch size x
    data-parallel size by masking what lies beyond it.
    """

    def __init__(self, config: RunConfig, place: Coordinates) -> None:
        self.config = config
        self.stream = open_stream(config, "validation")
        self.num_sequences = min(config.validation.sequences, self.stream.sequences_per_epoch)
        stride = config.train.micro_batch_size * config.parallel.data
        padded = -(-self.num_sequences // stride) * stride
        self._rows = micro_batch_rows(padded, config.parallel.data, place.data_rank, config.train.micro_batch_size)

    def loss(self, engine: StepEngine, pending: Callable[[], Request]) -> tuple[MeanLoss | None, Request]:
        """Mean loss over all valid targets of the set; called by all ranks together.

        Args:
            engine: the model.
            pending: what this rank is asked for; asked between schedule calls.

        Returns:
            The loss, or None if any rank is asked to stop before all is read; and the most urgent request.
        """
        total, request = LossSums.zero(self.config.model, compute_device()), Request.NONE
        for start in range(0, len(self._rows), ROUNDS_PER_CALL):
            rows = self._rows[start : start + ROUNDS_PER_CALL]
            batches = read_micro_batches(self.stream, 0, rows, compute_device())
            pairs = zip(rows, batches, strict=True)
            agreed = agree(engine.evaluate([self._without_excess(*pair) for pair in pairs]), pending())
            total, request = total + agreed.sums, agreed.request
            if request >= Request.STOP and start + ROUNDS_PER_CALL < len(self._rows):
                return None, request
        return mean_loss(total), request

    def _without_excess(self, rows: range, batch: MicroBatch) -> MicroBatch:
        """Masks sequences beyond the set; positions run on into the next epoch, which would count some twice."""
        inside = [row < self.num_sequences for row in rows]
        if all(inside):
            return batch
        return replace(batch, mask=batch.mask & batch.mask.new_tensor(inside)[:, None])
