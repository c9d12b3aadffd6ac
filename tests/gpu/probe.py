"""What a device makes of a model: one training step in fp32 and in bf16, and one greedy generation.

Usage: python -m tests.gpu.probe SIZE OUTPUT.safetensors
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoints.engine_state import engine_fragments
from inference.generator import Generator
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch
from parallel.stage import build_stage
from parallel.topology import initialize_topology, start_process_group
from slurm.identity import LOCAL_ADDRESS, free_port
from train.config import OptimizerConfig
from train.metrics import global_loss_sums, mean_loss
from train.step import StepEngine
from train.worker import ProcessIdentity, prepare_process

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
PARALLEL = ParallelConfig(zero_stage=1)
NEW_TOKENS = 24
KEPT_VALUES = 65536  # of each gradient, evenly spread, so that the file stays small


def probe_model(size: str) -> ModelConfig:
    """The paper's 85M block model, or one that a CPU runs in an instant."""
    if size == "85m":
        stack = DecoderConfig(num_layers=6, hidden_size=768, num_attention_heads=12)
        return ModelConfig(vocab_size=50304, sequence_length=2048, block_decoder=stack, token_decoder=stack)
    stack = DecoderConfig(num_layers=1, hidden_size=64, num_attention_heads=2)
    return ModelConfig(vocab_size=96, sequence_length=32, block_decoder=stack, token_decoder=stack)


def training_step(config: ModelConfig, precision: Literal["fp32", "bf16"]) -> dict[str, Tensor]:
    """Loss, gradient norm and clipped gradients of one step on two sequences; bf16 attends with flash attention only.

    In fp32 the second sequence is padded on both sides, which flash attention does not take.
    """
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, config.vocab_size, (2, config.sequence_length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if precision == "fp32":
        mask[1, :6] = False
        mask[1, -6:] = False
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    engine = StepEngine(build_stage(config, PARALLEL, dtype), PARALLEL, OPTIMIZER, precision, micro_batch_size=2)
    batch = MicroBatch(ids.to(compute_device()), mask.to(compute_device()))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if precision == "bf16" else nullcontext():
        loss = mean_loss(global_loss_sums(engine.accumulate([batch]))).loss
        result = engine.update(OPTIMIZER.learning_rate)
    values = {"loss": torch.tensor([loss]), "norm": torch.tensor([result.gradient_norm])}
    for fragment, moment in engine_fragments(engine.engine):
        if fragment.kind == "exp_avg":
            gradient = moment.flatten().float() / (1 - OPTIMIZER.beta1)
            values[f"gradient/{fragment.name}"] = gradient[:: -(-len(gradient) // KEPT_VALUES)].cpu().clone()
    engine.engine.destroy()
    return values


def generation(config: ModelConfig) -> Tensor:
    """Greedy continuations [2, NEW_TOKENS] of two prompts of unequal length, in fp32."""
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(0, config.vocab_size, (length,), generator=generator).tolist() for length in (5, 14)]
    return torch.tensor(Generator(build_stage(config, PARALLEL), pad_id=0).generate(prompts, NEW_TOKENS))


def main() -> None:
    """Computes everything and writes it down."""
    size, output = sys.argv[1], Path(sys.argv[2])
    prepare_process(ProcessIdentity(0, 1, 0, 1, LOCAL_ADDRESS, free_port()))
    torch.set_float32_matmul_precision("highest")
    start_process_group()
    initialize_topology(PARALLEL)
    config = probe_model(size)
    values = {"generated": generation(config)}
    for precision in ("fp32", "bf16"):
        values |= {f"{precision}/{name}": value for name, value in training_step(config, precision).items()}
    save_file(values, output, metadata={"device": str(compute_device()), "backend": torch.distributed.get_backend()})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
