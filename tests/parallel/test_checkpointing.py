"""Activation checkpointing changes memory, not gradients; the budget decides how much is recomputed."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.checkpointing import KEPT_OPERATIONS, POLICIES, Policy
from parallel.config import ParallelConfig
from parallel.inputs import MicroBatch
from parallel.planning.memory import activation_bytes
from parallel.planning.policies import BudgetError, check_budget, policy_counts, stage_policies
from parallel.planning.workload import Workload
from parallel.stage import build_stage
from train.selftest_models import MODELS

GIB = 2**30


def gradients(name: str, policy: Policy) -> dict[str, Tensor | None]:
    config = MODELS[name]
    stage = build_stage(config, ParallelConfig(activation_checkpointing=policy))
    for parameter_name, parameter in stage.named_parameters():
        if parameter_name.endswith("bias"):  # zero at first, which would hide one that is added twice
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = torch.arange(2 * config.sequence_length).view(2, -1) % config.vocab_size
    stage(MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))).sum().backward()
    return {name: parameter.grad for name, parameter in stage.named_parameters()}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["block", "vanilla Llama", "Llama, cross-attention", "Qwen3"])
def test_gradients_are_the_same(name: str) -> None:
    expected = gradients(name, "none")
    for policy in ("selective", "layer"):
        found = gradients(name, policy)  # type: ignore[arg-type]
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-7)


class Products(TorchDispatchMode):
    """Counts products with weights."""

    operations = KEPT_OPERATIONS & {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.mkldnn._linear_pointwise.default,
    }
    count = 0

    def __torch_dispatch__(self, operation: Any, _types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += operation in self.operations
        return operation(*arguments, **(options or {}))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_product_of_a_layer_is_not_computed_again(dtype: torch.dtype) -> None:
    """Recomputation ends before it, whichever library multiplies."""
    counts: dict[Policy, int] = {}
    config = MODELS["vanilla"]
    for policy in POLICIES:
        stage = build_stage(config, ParallelConfig(activation_checkpointing=policy), dtype)
        ids = torch.arange(2 * config.sequence_length).view(2, -1) % config.vocab_size
        loss = stage(MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))).sum()
        with Products() as products:
            loss.backward()
        counts[policy] = products.count
    layers = config.vanilla.num_layers
    assert counts["selective"] - counts["none"] == layers  # attention's output product
    assert counts["layer"] - counts["none"] == 3 * layers


def budgeted(gib: float, **layout: int) -> Workload:
    parallel = ParallelConfig.model_validate(
        {"activation_checkpointing": "budget", "activation_memory_gib": gib, **layout}
    )
    return Workload(MODELS["block"], parallel, 1, 8, "fp32", on_gpu=False)


def test_a_budget_recomputes_no_more_than_it_must() -> None:
    counts = {}
    needed = {
        policy: activation_bytes(budgeted(1.0), 0, dict.fromkeys(stage_policies(budgeted(1.0), 0), policy)) / GIB
        for policy in ("none", "selective", "layer")
    }
    for gib in (needed["none"], needed["none"] * 0.9, needed["selective"], needed["layer"]):
        work = budgeted(gib)
        policies = stage_policies(work, 0)
        assert activation_bytes(work, 0, policies) <= gib * GIB * (1 + 1e-9)
        counts[gib] = policy_counts(policies)
    assert counts[needed["none"]]["none"] == 4
    assert 0 < counts[needed["none"] * 0.9]["none"] < 4
    assert counts[needed["selective"]]["layer"] == 0
    assert needed["none"] > needed["selective"] > needed["layer"]


def test_early_stages_hold_more_micro_batches() -> None:
    work = budgeted(1.0, pipeline=2)
    first, last = (activation_bytes(work, stage, stage_policies(work, stage)) for stage in (0, 1))
    alone = activation_bytes(budgeted(1.0), 0, stage_policies(budgeted(1.0), 0))
    assert work.in_flight(0) == 2
    assert first > last
    assert first > 0.9 * alone


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"activation_memory_gib=1e-05 is less than the 0\.001 GiB .* pipeline stage"):
        check_budget(budgeted(1e-5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_checkpointing": "budget"}, "budget needs activation_memory_gib"),
        ({"activation_memory_gib": 2.0}, "activation_memory_gib=2.0 is only for .*budget, and that is none"),
        ({"activation_checkpointing": "some"}, "Input should be 'none', 'selective', 'layer' or 'budget'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ParallelConfig.model_validate(settings)


def test_the_switch_of_earlier_versions() -> None:
    for value, policy in ((True, "layer"), (False, "none")):
        assert ParallelConfig.model_validate({"activation_checkpointing": value}).activation_checkpointing == policy
