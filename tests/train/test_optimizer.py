"""Which parameters decay, and what DeepSpeed is told."""

import pytest

from parallel.config import ParallelConfig
from parallel.planning import states
from parallel.planning.states import BUCKET_VALUES
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.processes import run_processes
from train.config import OptimizerConfig
from train.optimizer import deepspeed_settings, parameter_groups
from train.selftest import Comparison, parity_matrix, run_matrix
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
    settings = deepspeed_settings(parallel, "bf16", 4, 1.0, parameters=1000)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    assert settings["gradient_clipping"] == 1.0


@pytest.mark.parametrize(("parameters", "values"), [(1000, 1000), (10 * BUCKET_VALUES, BUCKET_VALUES)])
def test_the_bucket_for_gradients_is_no_larger_than_the_model(parameters: int, values: int) -> None:
    settings = deepspeed_settings(ParallelConfig(overlap_gradient_reduction=True), "fp32", 4, 1.0, parameters)
    assert settings["zero_optimization"]["reduce_bucket_size"] == values
    assert settings["zero_optimization"]["overlap_comm"]


def compare_with_small_buckets() -> list[Comparison]:
    """Two replicas whose gradients need several buckets; some tensors are larger than a bucket."""
    states.BUCKET_VALUES = 2000
    cases = [case for case in parity_matrix(2) if case.parallel.data == 2 and case.parallel.overlap_gradient_reduction]
    return run_matrix(cases, report=print)


@pytest.mark.slow
def test_gradients_in_several_buckets() -> None:
    comparisons = run_processes(2, compare_with_small_buckets)[0]
    assert len(comparisons) == 5
    failed = [comparison for comparison in comparisons if not comparison.passed]
    assert not failed, "\n".join(map(str, failed))
