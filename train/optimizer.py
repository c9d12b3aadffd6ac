"""AdamW inside a DeepSpeed ZeRO engine."""

import contextlib
import io
import logging
import os
from typing import Any, Literal

import torch
from torch import nn

from parallel.config import ParallelConfig
from parallel.extensions import load_communication_op, use_extension_cache
from parallel.planning.states import bucket_values
from parallel.stage import Stage
from parallel.topology import DeepSpeedTopology
from train.config import OptimizerConfig

use_extension_cache()
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no accelerator
import deepspeed  # noqa: E402  (the cache of compiled operators must be named before)
from deepspeed.runtime.utils import clip_grad_norm_  # noqa: E402

# Parameters of fewer values stay whole under ZeRO 3: as many as by DeepSpeed's default, but less in a small model, of
# which nothing would be sharded otherwise.
PERSISTENT_VALUES = 100_000


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Splits parameters into a decayed and an undecayed group.

    `matrices` exempts biases, norms and embedding tables, as GPT-NeoX does; `all` decays everything, as the reference
    did for the paper.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_matrix = not (name.endswith(".bias") or "norm." in name or name.endswith("embedding.weight"))
        (decayed if config.decay == "all" or is_matrix else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over parameter_groups."""
    return torch.optim.AdamW(
        parameter_groups(module, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def deepspeed_settings(
    parallel: ParallelConfig,
    precision: Literal["fp32", "bf16"],
    micro_batch_size: int,
    clip: float,
    parameters: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration for a stage with so many parameters.

    Gradient accumulation is the schedule's business, so DeepSpeed is told of none; without ZeRO it does not report the
    gradient norm, so clipping is done by `clip_replicated`.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip if parallel.zero_stage else 0.0,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": parallel.overlap_gradient_reduction,
            "reduce_bucket_size": int(bucket_values(parameters)),
            "stage3_param_persistence_threshold": min(PERSISTENT_VALUES, parameters // 1000),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def build_engine(
    stage: Stage,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    precision: Literal["fp32", "bf16"],
    micro_batch_size: int,
) -> Any:
    """Wraps a stage and its AdamW into a DeepSpeed engine (`DeepSpeedEngine`)."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed prints memory use and the operators it loads, whatever the level of its log.
    with contextlib.redirect_stdout(io.StringIO()):
        load_communication_op()
        engine, *_ = deepspeed.initialize(
            model=stage,
            optimizer=adamw(stage, optimizer),
            config=deepspeed_settings(
                parallel,
                precision,
                micro_batch_size,
                optimizer.clip_gradient_norm,
                sum(parameter.numel() for parameter in stage.parameters()),
            ),
            mpu=DeepSpeedTopology(),
            dist_init_required=False,
        )
    return engine


def clip_replicated(engine: Any, max_norm: float) -> float:
    """Clips gradients in place without ZeRO and returns their global norm before clipping."""
    return float(clip_grad_norm_(list(engine.module.parameters()), max_norm, mpu=DeepSpeedTopology()))
