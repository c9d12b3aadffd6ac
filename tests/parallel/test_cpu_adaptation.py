"""Megatron-core without the CPU adaptation really fails; once a test here does not, the adaptation can go."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

import parallel.schedule
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.cpu_adaptation import adapt_megatron_to_cpu, cpu_schedule
from parallel.inputs import MicroBatch
from parallel.schedule import run_schedule
from parallel.stage import build_stage
from tests.processes import run_processes

PIPELINE = ParallelConfig(pipeline=2)

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="where CUDA exists there is nothing to adapt")


def failure(function: Callable[[], object]) -> str | None:
    """What torch says if the function asks for a CUDA device; None if it runs through."""
    try:
        function()
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return None


def about_cuda(message: str | None) -> bool:
    return message is not None and ("CUDA" in message or "NVIDIA" in message)


def run_one_batch() -> None:
    """One training batch through a pipeline of two stages; the topology must be initialized."""
    stack = DecoderConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    model = ModelConfig(vocab_size=32, sequence_length=16, block_decoder=stack, token_decoder=stack)
    stage = build_stage(model, PIPELINE)
    batch = MicroBatch(torch.ones(1, 16, dtype=torch.int64), torch.ones(1, 16, dtype=torch.bool))
    run_schedule(stage, PIPELINE, [batch, batch])


def _gather_before_and_after() -> tuple[str | None, str | None]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)

    def gather() -> None:
        gathered = gather_from_sequence_parallel_region(torch.ones(2, 3))
        assert gathered.shape == (4, 3)

    before = failure(gather)
    adapt_megatron_to_cpu()
    return before, failure(gather)


@needs_no_gpu
def test_sequence_parallel_gather_needs_it() -> None:
    for before, after in run_processes(2, _gather_before_and_after):
        assert about_cuda(before)
        assert after is None


def _pipeline(adapted: bool, in_context: bool) -> str | None:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, create_gloo_process_groups=False)
    if adapted:
        adapt_megatron_to_cpu()
    if not in_context:
        parallel.schedule.cpu_schedule = contextlib.nullcontext  # type: ignore[assignment]
    return failure(run_one_batch)


@needs_no_gpu
@pytest.mark.parametrize(("adapted", "in_context"), [(True, True), (True, False), (False, True)])
def test_the_pipeline_schedule_needs_both_parts(adapted: bool, in_context: bool) -> None:
    # Without one, the receiving stage cannot allocate; the sending one then loses its peer or fails alike.
    receiver = run_processes(2, _pipeline, adapted, in_context)[1]
    if adapted and in_context:
        assert receiver is None
    else:
        assert about_cuda(receiver)


def test_it_is_inert_where_cuda_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device, torch.cuda.synchronize
    adapt_megatron_to_cpu()
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    with cpu_schedule():
        assert torch._C._len_torch_function_stack() == 0
