"""What the planner says that stages receive is what the schedule sends."""

from math import prod
from typing import Any

import pytest

from parallel.config import ParallelConfig
from parallel.planning.activations import received_bytes
from parallel.planning.workload import Workload
from parallel.schedule import boundary_shape
from parallel.structure import piece_names
from train.selftest_models import MODELS

SEQUENCE, BLOCKS = {"sequence_parallel": True}, {"block_parallel": True}


@pytest.mark.parametrize("layout", [{}, SEQUENCE, BLOCKS, SEQUENCE | BLOCKS])
@pytest.mark.parametrize("name", ["block", "cross-attention", "MEGABYTE", "vanilla"])
def test_boundaries_have_the_size_of_what_crosses_them(name: str, layout: dict[str, Any]) -> None:
    model = MODELS[name]
    if not model.is_block and "block_parallel" in layout:
        layout = {}
    parallel = ParallelConfig(tensor=2, pipeline=2, **layout)
    work = Workload(model, parallel, 4, 8, "fp32", on_gpu=False)
    for piece in piece_names(model)[1:]:
        sent = prod(boundary_shape(model, parallel, piece, (4, model.sequence_length)))
        assert received_bytes(work, piece) == 4.0 * sent, piece
