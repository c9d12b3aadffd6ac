"""Decoding as a few recorded CUDA graphs: a launch for each unit of tokens instead of hundreds of kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from inference.engine import Engine
from inference.sampling import Sampler, check_finite

# Attention inside a graph goes over a fixed number of positions, those that are not yet there masked; a graph is
# recorded for each multiple of this, so that short texts do not pay for long ones.
SPAN = 64


class UnitGraphs:
    """Makes the tokens of a batch unit by unit: a block, or a few tokens of a vanilla model.

    On CPU, where nothing can be recorded, the same operations run one by one.

    Args:
        engine: has made the first unit of tokens, all but the last of them appended.
        sampler: chooses tokens.
        tokens: that unit, [B, unit_tokens].
        vocab_size: logits that count.
    """

    def __init__(self, engine: Engine, sampler: Sampler, tokens: Tensor, vocab_size: int) -> None:
        self._engine = engine
        self._sampler = sampler
        self._vocab_size = vocab_size
        self._tokens = tokens.clone()
        self._uniform = torch.zeros(tokens.shape[1], len(tokens), dtype=torch.float64, device=tokens.device)
        self._finite = torch.ones((), dtype=torch.bool, device=tokens.device)
        self._steps = 1 if engine.config.is_block else engine.unit_tokens
        self._replays: dict[int, Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if tokens.is_cuda else None

    def next(self) -> Tensor:
        """Makes the next unit; returns it as [B, unit_tokens], overwritten by the one after.

        Raises:
            InferenceError: a logit is not a number.
        """
        cache = self._engine.growing_cache
        needed = cache.length + self._steps
        span = min(-(-needed // SPAN) * SPAN, cache.capacity)
        for place in range(len(self._uniform)):
            self._uniform[place] = self._sampler.draw()
        cache.fix(span)
        if span not in self._replays:
            self._replays[span] = self._record() if self._tokens.is_cuda else self._run
        self._replays[span]()
        cache.length = needed
        check_finite(self._finite)
        return self._tokens

    def _run(self) -> None:
        self._engine.decode_unit(self._tokens, self._choose)

    def _choose(self, logits: Tensor, place: int) -> Tensor:
        tokens, finite = self._sampler.select(logits[:, : self._vocab_size], self._uniform[place])
        self._finite.logical_and_(finite)
        return tokens

    def _record(self) -> Callable[[], None]:
        """Records a unit; the rehearsal before it (lazy initialization is not allowed in a graph) is undone."""
        cache = self._engine.growing_cache
        assert cache.position is not None
        before = cache.length, cache.position.clone(), self._tokens.clone()
        rehearsal = torch.cuda.Stream()
        rehearsal.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(rehearsal):
            self._run()
        torch.cuda.current_stream().wait_stream(rehearsal)
        cache.length = before[0]
        cache.position.copy_(before[1])
        self._tokens.copy_(before[2])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run()
        return graph.replay
