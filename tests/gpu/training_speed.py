"""Trains a configuration's model for some steps on one process and reports speed and peak memory as JSON.

Usage: python -m tests.gpu.training_speed STEPS CONFIG [section.field=value ...]
"""

import json
import sys
from pathlib import Path

import torch

from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch
from parallel.stage import build_stage
from parallel.topology import initialize_topology, start_process_group
from slurm.identity import LOCAL_ADDRESS, free_port
from train.config import RunConfig
from train.config_file import load_config
from train.metrics import global_loss_sums, mean_loss
from train.monitor import peak_memory_bytes
from train.schedule import learning_rate
from train.step import StepEngine
from train.throughput import SpeedMeter
from train.worker import ProcessIdentity, prepare_process

WARMUP_STEPS = 5  # not timed: the first ones allocate memory and choose kernels


def measure(config: RunConfig, steps: int) -> dict[str, float | list[float] | str | None]:
    """Trains on one micro-batch of random tokens, always the same, so that the loss must fall."""
    initialize_topology(config.parallel)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    stage = build_stage(config.model, config.parallel, dtype)
    size = config.train.micro_batch_size
    engine = StepEngine(stage, config.parallel, config.optimizer, config.train.precision, size)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, config.model.vocab_size, (size, config.model.sequence_length), generator=generator)
    batch = MicroBatch(ids.to(compute_device()), torch.ones_like(ids, dtype=torch.bool, device=compute_device()))
    meter = SpeedMeter(config.model, config.parallel.world_size)
    losses = []
    for step in range(1, steps + 1):
        meter.start_step()
        losses.append(mean_loss(global_loss_sums(engine.accumulate([batch]))).loss)
        engine.update(learning_rate(config.optimizer, step, config.train.steps))
        meter.end_step(batch.token_ids.numel())
        if step == WARMUP_STEPS:
            meter.read()
    speed = meter.read()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "losses": losses,
        "tokens_per_second": speed.tokens_per_second,
        "tflops": speed.tflops_per_process,
        "mfu": speed.model_flops_utilization,
        "peak_memory_gib": peak_memory_bytes() / 2**30,
    }


def main() -> None:
    """Measures and prints."""
    prepare_process(ProcessIdentity(0, 1, 0, 1, LOCAL_ADDRESS, free_port()))
    config = load_config(Path(sys.argv[2]), sys.argv[3:])
    start_process_group()
    print(json.dumps(measure(config, int(sys.argv[1]))))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
