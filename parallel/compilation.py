"""torch.compile of decoder layers.

What surrounds the matrix products is compiled: norms, rotary positions, attention, activations, residual sums. The
products are called as they are: a GPU's libraries are as fast, the compiler cannot lower oneDNN's
(parallel/products.py), and the collectives of tensor parallelism keep their order.
"""

import os
import shutil
import warnings

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn
from torch._dynamo.utils import calculate_time_spent

from parallel.cpu_adaptation import compute_device
from parallel.decoder_layer import DecoderLayer
from parallel.errors import ConfigurationError
from parallel.linear import SharedRowsLinear


def compile_layers(model: nn.Module) -> None:
    """Has decoder layers compiled when training first calls them; those of one shape share the code.

    Batches with and without padding are compiled for separately. Layers that are computed again in backward stay as
    they are, since torch does that without the compiler, and so does evaluation, whose batches have other shapes.

    Raises:
        ConfigurationError: on CPU, there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if compute_device().type == "cpu" and shutil.which(compiler) is None:
        raise ConfigurationError(
            f"train.compile_layers=true needs a C++ compiler, and there is no {compiler}; install the package g++, "
            "or set it to false"
        )
    torch.compiler.reset()  # only so many shapes are compiled in a process, and a model before this one had others
    # The tables of rotary positions, which become part of the compiled code.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | SharedRowsLinear):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        elif isinstance(module, DecoderLayer):
            module.compiled = torch.compile(module.transform, dynamic=False)


def compile_seconds() -> float:
    """Time spent on compilation since compile_layers was last called, which sets torch's count back."""
    return float(calculate_time_spent()["total_wall_time"])
