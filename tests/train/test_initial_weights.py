"""run.initial_weights: a new run starts from them under any layout, and only if they are of its own model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.fragments import FragmentReader
from checkpoints.store import CheckpointStore
from parallel.errors import ConfigurationError
from parallel.topology import initialize_topology
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from train.config import RunConfig
from train.initial_weights import initial_weights, model_differences
from train.requests import Requests
from train.selftest_models import MODELS
from train.stop_signals import StopSignals
from train.trainer import Trainer


def _train(configs: list[RunConfig]) -> list[str]:
    """Trains runs one after another; the error of each, empty where there is none."""
    errors = []
    for config in configs:
        try:
            Trainer(
                config, initialize_topology(config.parallel), Requests(config.directory, StopSignals(), None, 0.0, True)
            ).run()
            errors.append("")
        except ConfigurationError as error:
            errors.append(str(error))
    return errors


def _weights(config: RunConfig) -> dict[str, torch.Tensor]:
    path = CheckpointStore(config.directory / "checkpoints").at_step(1).path
    with FragmentReader(path) as reader:
        return {name: reader.read_full(name, "weight") for name in reader.names("weight")}


@pytest.mark.slow
def test_a_run_starts_from_them_under_any_layout(tmp_path: Path) -> None:
    shards = prepare_small_corpus(tmp_path)

    def one_step(name: str, **sections: dict[str, Any]) -> RunConfig:
        return small_run(tmp_path, shards, name, **({"train": {"stop_step": 1}} | sections))

    first = one_step("first")
    still: dict[str, Any] = {"optimizer": {"learning_rate": 1e-9, "weight_decay": 0.0}}
    origin: dict[str, Any] = {"initial_weights": str(first.directory)}
    layouts: dict[str, dict[str, Any]] = {
        "tensor": {"tensor": 2, "data": 1, "sequence_parallel": True},
        "pipeline": {"pipeline": 2, "data": 1},
    }
    half = {f"half{zero}": {"zero_stage": zero} for zero in (1, 2, 3)}  # the master weights must not be rounded
    runs = [
        one_step(
            name,
            run={"name": name, "root": str(tmp_path), **origin},
            parallel=layout,
            train={"stop_step": 1, "precision": "bf16" if name in half else "fp32"},
            **still,
        )
        for name, layout in {**layouts, **half}.items()
    ]
    stack = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    scrambled = one_step(
        "scrambled", run={"name": "scrambled", "root": str(tmp_path), **origin}, model={"block_decoder": stack}
    )
    *good, bad = run_processes(2, _train, [first, *runs, scrambled])[0]
    assert good == [""] * 6
    assert "holds another model: " in bad
    assert "model.block_decoder.num_attention_heads is 4 there and 2 here" in bad
    expected = _weights(first)
    for config in runs:
        weights = _weights(config)
        assert weights.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(weights[name], values, rtol=0, atol=1e-7, msg=name)
    with pytest.raises(ConfigurationError, match=r"run.initial_weights=.*num_attention_heads is 4 there and 2 here"):
        initial_weights(scrambled)


@pytest.mark.parametrize("name", MODELS)
def test_defaults_that_are_spelled_out_make_no_other_model(name: str) -> None:
    model = MODELS[name]
    stacks = {
        kind: stack.model_copy(
            update={
                "num_key_value_heads": stack.key_value_heads,
                "attention_head_size": stack.head_size,
                "ffn_hidden_size": stack.feed_forward_size,
            }
        )
        for kind in ("block_decoder", "token_decoder", "decoder")
        if (stack := getattr(model, kind)) is not None
    }
    spelled = model.model_copy(update={**stacks, "sequence_length": 2 * model.sequence_length})
    assert model_differences(model, spelled) == []
    deeper = next(iter(stacks.items()))
    changed = spelled.model_copy(update={deeper[0]: deeper[1].model_copy(update={"num_layers": 9})})
    assert model_differences(model, changed) == [
        f"model.{deeper[0]}.num_layers is {deeper[1].num_layers} there and 9 here"
    ]


def test_every_setting_that_changes_the_function_counts() -> None:
    model = MODELS["block"]
    for changes in (
        {"backbone": model.backbone.model_copy(update={"rotary_base": 5e5})},
        {"prefix_length": 3},
        {"token_decoder_input": "summation"},
        {"tie_word_embeddings": True},
        {"embedder": MODELS["lookup with projection"].embedder},
    ):
        assert model_differences(model, model.model_copy(update=changes)), changes
    assert model_differences(MODELS["vanilla"], model)
