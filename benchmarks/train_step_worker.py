"""One process of a measured model: builds it, then does what it is told on standard input, one line at a time.

It takes the project's modules from the checkout that is named first on its command line, so that two versions of the
project can be measured side by side; it may use only what both have.
"""

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [sys.argv[1], str(Path(__file__).resolve().parent)]  # the second is not there under PYTHONSAFEPATH
# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch
import torch.distributed

from parallel.cpu_adaptation import compute_device
from parallel.device_limits import synchronize
from parallel.inputs import MicroBatch
from parallel.stage import build_stage
from parallel.topology import initialize_topology, start_process_group
from train.config import RunConfig
from train.process import ProcessIdentity, prepare_process
from train.step import StepEngine

# Of this folder: another version may not have them.
ALLOCATIONS = importlib.import_module("allocations")
COMPONENTS = importlib.import_module("step_components")
SURROUNDINGS = importlib.import_module("step_surroundings")
YARDSTICK = 2048  # rows and columns of the product that is timed before and after each step


class Yardstick:
    """A large matrix product. Its matrices are filled at once, so that they are there before the model is.

    Args:
        device: computes it.
        dtype: of the matrices.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        size = YARDSTICK if device.type == "cpu" else 4 * YARDSTICK
        self._device = device
        self._factor = torch.randn(size, size, device=device, dtype=dtype)
        self._product = torch.zeros_like(self._factor)

    def flops_per_second(self) -> float:
        """The rate of the product now."""
        synchronize(self._device)
        started = time.perf_counter()
        torch.mm(self._factor, self._factor, out=self._product)
        synchronize(self._device)
        flops: float = 2.0 * float(len(self._factor)) ** 3
        return flops / (time.perf_counter() - started)


class Memory:
    """The most memory beyond what this process has now.

    Measured by this folder's code: older versions of the project say something else.

    Args:
        device: whose memory it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.before: int = torch.cuda.memory_allocated() if self._on_gpu else ALLOCATIONS.restart_peak()

    def peak(self) -> int:
        """The peak so far, with what there was before."""
        return int(torch.cuda.max_memory_allocated() if self._on_gpu else ALLOCATIONS.peak_resident_bytes())


class Subject:
    """A model with its optimizer and a fixed global batch of random tokens.

    Args:
        config: the run.
    """

    def __init__(self, config: RunConfig) -> None:
        place = initialize_topology(config.parallel)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.config, self.device = config, compute_device()
        self._yardstick = Yardstick(self.device, dtype)
        self.memory = Memory(self.device)
        choice = {}
        if config.parallel.activation_checkpointing == "budget":
            planning = importlib.import_module("parallel.planning.policies")  # not there in older versions
            choice["policies"] = planning.stage_policies(config.workload, place.pipeline_rank)
        self.stage = build_stage(config.model, config.parallel, dtype, **choice)
        train = config.train
        if getattr(train, "compile_layers", False):
            importlib.import_module("parallel.compilation").compile_layers(self.stage)
        self.engine = StepEngine(self.stage, config.parallel, config.optimizer, train.precision, train.micro_batch_size)
        generator = torch.Generator().manual_seed(place.data_rank)
        count = config.train.global_batch_size // (config.parallel.data * train.micro_batch_size)
        self.batches = [self._random_batch(generator) for _ in range(count)]

    def step(self) -> dict[str, float]:
        """Seconds of one step and its parts, FLOP/s of a large matrix product right before and after, memory."""
        before = self._yardstick.flops_per_second()
        torch.distributed.barrier()  # the wait for another rank's yardstick is no part of the step
        started = self._now()
        self.engine.accumulate(self.batches)
        accumulated = self._now()
        self.engine.update(1e-4)
        done = self._now()
        after = self._yardstick.flops_per_second()
        return {
            "step_seconds": done - started,
            "optimizer_seconds": done - accumulated,
            "yardstick_flops_per_second": 2 / (1 / before + 1 / after),
            "peak_bytes": self.memory.peak(),
        }

    def components(self) -> dict[str, float]:
        """Seconds of a step by component; with hooks and waits, so it is somewhat slower than others."""
        compiling = self._compile_seconds()
        seconds: dict[str, float] = COMPONENTS.timed_components(self.engine, self.batches)
        if self.config.parallel.world_size > 1:
            sending = SURROUNDINGS.communication_seconds(self.engine, self.batches)
            seconds["communication, in the step and partly beside the rest of it"] = sending
        seconds["data, before the step"] = SURROUNDINGS.data_seconds(self.config, self.device)
        seconds["logging, after it"] = SURROUNDINGS.logging_seconds(self.config)
        if compiling:
            seconds["compilation, once"] = compiling
        return seconds

    def _compile_seconds(self) -> float:
        if not getattr(self.config.train, "compile_layers", False):
            return 0.0
        return float(importlib.import_module("parallel.compilation").compile_seconds())

    def _random_batch(self, generator: torch.Generator) -> MicroBatch:
        shape = self.config.train.micro_batch_size, self.config.model.sequence_length
        ids = torch.randint(self.config.model.vocab_size, shape, generator=generator).to(self.device)
        return MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    """Argument 2 is the run as JSON; each line of input names a method of Subject, whose result is answered as JSON."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    identity = ProcessIdentity(rank, world_size, rank, world_size, "127.0.0.1", int(os.environ["MASTER_PORT"]))
    prepare_process(identity, int(os.environ["OMP_NUM_THREADS"]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    start_process_group()
    subject = Subject(RunConfig.model_validate_json(sys.argv[2]))
    commands: dict[str, Callable[[], Any]] = {"step": subject.step, "components": subject.components}
    print(json.dumps({"imports_bytes": subject.memory.before}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), file=answers, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
