"""Step times follow counts of FLOPs and bytes: they move as they must, and add up by hand where that is simple."""

from dataclasses import replace
from typing import Any

import pytest

from parallel.config import ParallelConfig
from parallel.costs import forward_flops_per_token
from parallel.planning.communication import Cluster
from parallel.planning.hardware import DEVICES, NETWORKS
from parallel.planning.policies import stage_policies
from parallel.planning.search import Training, evaluate, search, with_policy
from parallel.planning.step_time import StepTime, stage_balance, step_time
from parallel.planning.workload import Workload
from train.selftest_models import MODELS

CLUSTER = Cluster(DEVICES["h100-80g"], 8, NETWORKS["infiniband-400"])
MODEL = MODELS["block"]


def work(size: int = 1, count: int = 8, **layout: Any) -> Workload:
    return Workload(MODEL, ParallelConfig.model_validate(layout), size, count, "fp32")


def seconds(one: Workload, cluster: Cluster = CLUSTER) -> StepTime:
    return step_time(one, cluster, [stage_policies(one, stage) for stage in range(one.parallel.pipeline)])


def test_rings() -> None:
    link = CLUSTER.device
    assert CLUSTER.all_reduce(8e9, 4, 4) == pytest.approx(2 * 3 * (2e9 / link.link_bytes_per_second + 1e-5))
    assert CLUSTER.all_gather(8e9, 4, 16) == pytest.approx(3 * (2e9 / (50e9 * 0.8) + 1.5e-5))
    assert CLUSTER.all_reduce(8e9, 1, 1) == 0.0
    assert CLUSTER.all_reduce(8e9, 4, 4, pieces=5) - CLUSTER.all_reduce(8e9, 4, 4) == pytest.approx(2 * 3 * 4 * 1e-5)


def test_products_are_counted_three_times_over_the_peak() -> None:
    device = CLUSTER.device.model_copy(
        update={"product_efficiency": 0.5, "attention_efficiency": 0.5, "product_ramp_flops": 0.0}
    )
    flops = 3 * forward_flops_per_token(MODEL) * MODEL.sequence_length * 16
    found = seconds(work(size=2), Cluster(device, 8, None)).products
    assert found == pytest.approx(flops / (0.5 * device.flops_per_second["fp32"]), rel=1e-6)


def test_what_costs_time_costs_time() -> None:
    plain = seconds(work(zero_stage=0))
    assert seconds(with_policy(work(), "layer")).recomputation > seconds(with_policy(work(), "selective")).recomputation
    assert seconds(with_policy(work(), "selective")).recomputation > plain.recomputation == 0.0
    assert seconds(work(tensor=2)).tensor > plain.tensor == 0.0
    assert seconds(work(data=2)).data > plain.data == 0.0
    assert seconds(work(data=2, zero_stage=3)).optimizer < seconds(work(data=2, zero_stage=0)).optimizer
    assert seconds(work(pipeline=2)).pipeline > plain.pipeline == 0.0


def test_collectives_of_tensor_parallelism_add_up() -> None:
    """By hand, of 8 micro-batches: two sums in each pass of a layer, one of each embedding, one before the head."""
    layers, width = MODEL.blocks.num_layers, MODEL.blocks.hidden_size
    values = {
        "blocks": MODEL.num_blocks * width * (4 * layers + 1),
        "tokens": MODEL.num_blocks * MODEL.local_length * width * 4 * layers,
        "embedded": MODEL.num_blocks * (MODEL.block_length - 1) * width,
        "head": MODEL.sequence_length * width,
    }
    sums = 4 * layers * 2 + 3
    expected = 8 * (sum(values.values()) * 4 / CLUSTER.device.link_bytes_per_second + sums * 2e-5)
    assert seconds(work(tensor=2, zero_stage=0)).tensor == pytest.approx(expected)


def test_partial_gradients_are_summed_once_in_a_step_unless_zero_reduces_them_before() -> None:
    once, often = (seconds(work(tensor=2, sequence_parallel=True, data=2, zero_stage=zero)) for zero in (1, 2))
    assert seconds(work(tensor=2, sequence_parallel=True, data=2, count=16)).tensor < 2.0 * once.tensor
    pieces = 4 + 3  # layers, and what stands around them without the embedder, all of which is split
    latency = CLUSTER.all_reduce(0.0, 2, 2)
    assert often.tensor - once.tensor == pytest.approx((8 * 6 * pieces - 1) * latency, rel=0.05)
    own, shared = (seconds(work(tensor=2, block_parallel=blocks, zero_stage=1)) for blocks in (True, False))
    assert own.tensor < shared.tensor


def test_a_gpu_waits_for_python_only_where_it_has_nothing_to_do() -> None:
    layers = 2 * MODEL.blocks.num_layers
    fast = Cluster(CLUSTER.device.model_copy(update={"product_ramp_flops": 0.0}), 8, None)
    on_gpu, on_cpu = (
        {policy: seconds(with_policy(replace(work(), on_gpu=place), policy), fast) for policy in ("none", "selective")}
        for place in (True, False)
    )
    # So small a layer is done before Python has looked at its operators.
    assert on_gpu["selective"].total - on_gpu["none"].total == pytest.approx(8 * layers * 2e-3, rel=0.01)
    slow = Cluster(CLUSTER.device.model_copy(update={"bytes_per_second": 1e6}), 8, None)
    busy, none = (seconds(with_policy(work(), policy), slow) for policy in ("selective", "none"))
    assert busy.elementwise == none.elementwise
    assert on_cpu["selective"].elementwise - on_cpu["none"].elementwise > 0.9 * 8 * layers * 2e-3


def test_nodes_apart_are_slower() -> None:
    far = seconds(work(data=16))
    assert far.data > seconds(work(data=16), replace(CLUSTER, devices_per_node=16)).data


def test_groups_and_stages_that_lie_across_nodes_go_over_the_network() -> None:
    """Ranks 6 to 8 of tensor-parallel size 3 lie on two nodes of 8, unless there are but 6 ranks."""
    assert seconds(work(tensor=3, data=2)).tensor == seconds(work(tensor=3)).tensor
    assert seconds(work(tensor=3, data=3)).tensor > 1.4 * seconds(work(tensor=3)).tensor
    assert seconds(work(tensor=4, data=4)).tensor == seconds(work(tensor=4)).tensor
    apart, together = (seconds(work(tensor=4, pipeline=4), replace(CLUSTER, devices_per_node=n)) for n in (8, 16))
    assert apart.pipeline > together.pipeline


def test_devices_share_a_port() -> None:
    port = CLUSTER.network.model_copy(update={"shared": True})
    shared = replace(CLUSTER, network=port)
    own = 3 * 2e9 / (50e9 * 0.8)
    assert CLUSTER.all_gather(8e9, 4, 16) == pytest.approx(own + 3 * 1.5e-5)
    # Four rings leave each node; one that goes through all processes leaves it once.
    assert shared.all_gather(8e9, 4, 16) == pytest.approx(4 * own + 3 * 1.5e-5)
    assert shared.all_gather(8e9, 16, 16) == CLUSTER.all_gather(8e9, 16, 16)
    assert shared.send(1e9, 32, 16) - 1.5e-5 == pytest.approx(8 * (CLUSTER.send(1e9, 32, 16) - 1.5e-5))


def test_shared_key_heads_are_held_and_summed_by_all_ranks() -> None:
    """A matrix that two ranks hold whole is a partial gradient of both, also without sequence parallelism."""
    grouped = Workload(MODELS["vanilla, multi-query"], ParallelConfig(tensor=2, zero_stage=0), 1, 8, "fp32")
    whole = replace(grouped, parallel=ParallelConfig(tensor=1, zero_stage=0))
    shared = sum(piece.shared_by(2) for piece in grouped.stages[0])
    held, everything = (sum(one.parameters(piece) for piece in one.stages[0]) for one in (grouped, whole))
    split = sum(piece.split_parameters for piece in grouped.stages[0])
    assert shared > 0
    assert held == everything - (split - shared) // 2
    device = CLUSTER.device.model_copy(update={"link_bytes_per_second": 1.0, "link_latency": 0.0})
    slow = replace(CLUSTER, device=device)
    once, twice = (seconds(replace(grouped, num_micro_batches=count), slow).tensor for count in (1, 2))
    assert 2.0 * once - twice == pytest.approx(4.0 * shared)


def test_zero_3_gathers_each_module_for_itself() -> None:
    """So where latency is all that a small model's collectives cost, it is slower than ZeRO 1."""
    modules = 4 * 4 + 4  # linear layers of the decoder layers, and the pieces around them
    latency = CLUSTER.all_gather(0.0, 64, 64)
    sharded, whole = (seconds(work(count=1, data=64, zero_stage=stage)).data for stage in (3, 1))
    assert sharded > whole
    assert sharded == pytest.approx((1 + modules) * latency, rel=0.05)


def test_the_bubble_shrinks_with_micro_batches() -> None:
    """Equal stages: (P - 1) / (M + P - 1)."""
    alone, balance = stage_balance(work(count=1, pipeline=2))
    many, same = stage_balance(work(count=100, pipeline=2))
    assert balance == same <= 1.0
    assert many < alone
    assert stage_balance(work(count=4)) == (pytest.approx(0.0), 1.0)
    for count in (1, 3, 8):
        idle, balance = stage_balance(work(count=count, pipeline=2))
        slower, faster = 1.0, 2.0 * balance - 1.0  # the stages' times per micro-batch
        lasts = faster + count * slower
        assert idle == pytest.approx(1.0 - count * (slower + faster) / 2 / lasts)


def test_the_search_finds_only_what_is_allowed_and_fits() -> None:
    training = Training(MODEL, 8, "bf16", decays_all=True)
    found = search(training, CLUSTER, 4)
    times = [plan.time.total for plan in found.plans]
    assert times == sorted(times)
    assert {plan.work.parallel.world_size for plan in found.plans} == {4}
    assert all(plan.work.parallel.zero_stage for plan in found.plans)
    assert any("zero_stage=0" in reason for reason in found.refused)
    assert all(plan == evaluate(plan.work, CLUSTER) for plan in found.plans[:3])
    unshared = search(Training(MODEL, 8, "fp32", decays_all=True), CLUSTER, 1)
    stages = {plan.work.parallel.zero_stage for plan in unshared.plans}
    assert stages == {0, 3}, "1 and 2 would train as 0 does"
    small = Cluster(CLUSTER.device.model_copy(update={"memory_gib": 1e-4, "reserved_gib": 0.0}), 8, None)
    nothing = search(training, small, 4)
    assert not nothing.plans
    assert nothing.smallest is not None
