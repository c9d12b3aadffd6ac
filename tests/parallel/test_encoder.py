"""Dropout of the RoBERTa embedder; its numbers are compared with the reference in test_golden.py."""

import torch
from torch import Tensor

from parallel.component_config import EmbedderConfig, EncoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.encoder import Dropout
from parallel.inputs import MicroBatch, prepare_inputs
from parallel.stage import Stage, build_stage
from parallel.topology import initialize_topology
from tests.processes import run_processes
from train.selftest_models import MODELS


def with_dropout(rate: float) -> ModelConfig:
    encoder = EncoderConfig(num_layers=2, hidden_size=16, num_attention_heads=2, max_positions=16, dropout=rate)
    return MODELS["RoBERTa"].model_copy(update={"embedder": EmbedderConfig(kind="roberta", encoder=encoder)})


def batch(seed: int = 0) -> MicroBatch:
    ids = torch.randint(2, 96, (2, 32), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))


def embedded(stage: Stage, one: MicroBatch) -> Tensor:
    output: Tensor = stage.run(None, prepare_inputs(stage.model_config, one), ["embedder"])
    return output.detach()


def test_dropout_acts_in_training_only_and_repeats_itself() -> None:
    plain, dropped = (build_stage(with_dropout(rate), ParallelConfig()) for rate in (0.0, 0.3))
    trained = embedded(dropped, batch())
    assert torch.equal(trained, embedded(dropped, batch())), "a resumed run must draw the same masks"
    assert not torch.allclose(trained, embedded(plain, batch()))
    with torch.no_grad():
        assert torch.equal(embedded(dropped, batch()), embedded(plain, batch()))
    assert torch.equal(embedded(dropped.eval(), batch()), embedded(plain, batch()))


def test_rate_and_scale() -> None:
    stage = build_stage(with_dropout(0.25), ParallelConfig())
    encoder = stage.piece("embedder").encoder
    dropout = encoder._dropout(batch().token_ids)
    first = dropout(torch.ones(200, 200))
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.01
    assert not torch.equal(first, dropout(torch.ones(200, 200))), "every place draws its own mask"
    assert not torch.equal(first, encoder._dropout(batch(1).token_ids)(torch.ones(200, 200)))


def test_long_batches_of_large_ids_have_a_seed_too() -> None:
    dropped = Dropout(0.5, torch.full((1, 1 << 21), 250_000), rank=1)
    assert set(dropped(torch.ones(64)).tolist()) == {0.0, 2.0}


def _embedded_under_tensor_parallelism() -> list[list[list[float]]]:
    parallel = ParallelConfig(tensor=2)
    initialize_topology(parallel)
    values: list[list[list[float]]] = embedded(build_stage(with_dropout(0.3), parallel), batch()).tolist()
    return values


def test_tensor_parallel_ranks_draw_alike() -> None:
    whole = embedded(build_stage(with_dropout(0.3), ParallelConfig()), batch())
    for sharded in run_processes(2, _embedded_under_tensor_parallelism):
        torch.testing.assert_close(torch.tensor(sharded), whole, rtol=1e-5, atol=1e-6)
