"""Learning rate as a pure function of the step."""

import math

from train.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up from 0, then cosine down to minimum_ratio of the peak, as in the paper.

    Args:
        config: peak, warm-up and final ratio.
        step: optimizer step about to be taken, from 1.
        total_steps: step at which the cosine ends.
    """
    peak = config.learning_rate
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (config.minimum_ratio + (1.0 - config.minimum_ratio) * cosine)
