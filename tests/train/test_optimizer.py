"""Which parameters decay, and what DeepSpeed is told."""

import pytest

from parallel.config import ParallelConfig
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.processes import run_processes
from train.config import OptimizerConfig
from train.optimizer import deepspeed_settings, parameter_groups
from train.selftest_models import MODELS


def decayed_names(decay: str) -> tuple[set[str], set[str]]:
    """(decayed, exempt) parameter names of the small block model."""
    initialize_topology(ParallelConfig())
    stage = build_stage(MODELS["block"], ParallelConfig())
    names = {id(parameter): name for name, parameter in stage.named_parameters()}
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.1, decay=decay)  # type: ignore[arg-type]
    decayed: set[str] = set()
    exempt: set[str] = set()
    for group in parameter_groups(stage, config):
        (decayed if group["weight_decay"] else exempt).update(names[id(parameter)] for parameter in group["params"])
    return decayed, exempt


def test_only_matrices_decay_by_default() -> None:
    decayed, exempt = run_processes(1, decayed_names, "matrices")[0]
    assert "block_decoder.layers.0.attention.query_key_value.weight" in decayed
    assert "token_decoder.output.head.weight" in decayed
    assert "token_decoder.input.expansion.weight" in decayed
    assert all(name.endswith(".weight") for name in decayed)
    assert "embedder.embedding.weight" in exempt
    assert "token_decoder.input.embedding.weight" in exempt
    assert {name for name in exempt if not name.endswith(".bias")} == {
        name for name in exempt if "norm." in name or "embedding." in name
    } - {name for name in exempt if name.endswith(".bias")}


def test_everything_decays_as_in_the_reference() -> None:
    decayed, exempt = run_processes(1, decayed_names, "all")[0]
    assert not exempt
    assert "embedder.embedding.weight" in decayed


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_accumulates_and_communicates_in_fp32(zero_stage: int) -> None:
    parallel = ParallelConfig(zero_stage=zero_stage)  # type: ignore[arg-type]
    settings = deepspeed_settings(parallel, "bf16", 4, 1.0)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    assert settings["gradient_clipping"] == 1.0
