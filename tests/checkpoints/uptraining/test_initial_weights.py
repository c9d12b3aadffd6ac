"""Initial weights from a vanilla model, against what the reference's initialization recorded, key by key."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.errors import CheckpointError
from checkpoints.uptraining.block_growth import GrownSource
from checkpoints.uptraining.initial_weights import UptrainedSource, UptrainingOptions
from checkpoints.uptraining.layer_assignment import assign_layers
from checkpoints.weights.weight_source import WeightSource, open_vanilla_source
from parallel.component_config import DecoderConfig, EmbedderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.inputs import MicroBatch, prepare_inputs
from parallel.stage import Stage, build_stage
from tests.golden_reference import GOLDEN, HEAD_SIZE, NUM_BLOCKS, relative_difference, rename
from tests.parallel.test_golden import TOLERANCE, by_sequence

LAYERS = {"partition": 4, "skip": 4, "duplicate": 2}
WIDTH = 32
VOCAB_SIZE = 128
UNTOUCHED = ("block_decoder.output.norm.weight", "block_decoder.output.norm.bias")


def target(**changes: object) -> ModelConfig:
    stack = DecoderConfig(num_layers=2, hidden_size=WIDTH, num_attention_heads=WIDTH // HEAD_SIZE)
    values = {
        "vocab_size": VOCAB_SIZE,
        "sequence_length": NUM_BLOCKS * 4,
        "block_length": 4,
        "embedder": EmbedderConfig(kind="lookup_projection"),
        "block_decoder": stack,
        "token_decoder": stack,
    }
    return ModelConfig.model_validate(values | changes)


def vanilla_folder(folder: Path, weights: Path, num_layers: int) -> Path:
    """Recorded vanilla weights as the Hugging Face folder they came from."""
    folder.mkdir()
    save_file(load_file(weights), folder / "model.safetensors")
    config = {
        "model_type": "gpt_neox",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "num_hidden_layers": num_layers,
        "num_attention_heads": WIDTH // HEAD_SIZE,
        "intermediate_size": 4 * WIDTH,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vanilla")
    return {
        method: vanilla_folder(root / method, GOLDEN / f"uptrain_{method}" / "vanilla.safetensors", layers)
        for method, layers in LAYERS.items()
    }


def filled(source: WeightSource) -> Stage:
    stage = build_stage(source.model, ParallelConfig(), seed=None)
    assert {name for name, _ in stage.named_parameters()} == set(source.names)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            parameter.copy_(source.read(name))
    return stage


@pytest.mark.parametrize("method", LAYERS)
def test_every_weight_equals_the_references(method: str, folders: dict[str, Path]) -> None:
    recorded = rename(load_file(GOLDEN / f"uptrain_{method}" / "block.safetensors"), target())
    with open_vanilla_source(folders[method]) as vanilla:
        source = UptrainedSource(vanilla, target(), UptrainingOptions(method))  # type: ignore[arg-type]
        assert set(source.names) == set(recorded)
        for name in source.names:
            if name not in UNTOUCHED:
                assert torch.equal(source.read(name), recorded[name]), f"{name} <- {source.origin(name)}"
        assert torch.equal(source.read(UNTOUCHED[0]), torch.ones(WIDTH))
        assert torch.equal(source.read(UNTOUCHED[1]), torch.zeros(WIDTH))
        fresh = {name for name, origin in source.origins() if "initialized" in origin}
        assert fresh == {*UNTOUCHED, "embedder.projection.bias", "token_decoder.input.expansion.bias"}


@pytest.mark.parametrize("case", ["nopad", "pad"])
@pytest.mark.parametrize("method", LAYERS)
def test_outputs_equal_the_references(method: str, case: str, folders: dict[str, Path]) -> None:
    inputs, outputs = (
        load_file(GOLDEN / f"uptrain_{method}" / f"{kind}.safetensors") for kind in ("inputs", "outputs")
    )
    recorded = rename(load_file(GOLDEN / f"uptrain_{method}" / "block.safetensors"), target())
    with open_vanilla_source(folders[method]) as vanilla:
        stage = filled(UptrainedSource(vanilla, target(), UptrainingOptions(method)))  # type: ignore[arg-type]
    stage.load_state_dict({name: recorded[name] for name in UNTOUCHED}, strict=False)
    batch = MicroBatch(
        inputs[f"{case}.input_ids"].reshape(2, -1), inputs[f"{case}.attention_mask"].reshape(2, -1).bool()
    )
    with torch.no_grad():
        logits = by_sequence(stage.logits(batch))
    valid = ~outputs[f"{case}.token_loss"].isnan()
    assert relative_difference(logits[valid], outputs[f"{case}.logits"][valid]) < TOLERANCE


def test_assignments() -> None:
    assert assign_layers("partition", 5, 2, 3) == ([(0,), (1,)], [(2,), (3,), (4,)])
    assert assign_layers("skip", 6, 3, 2) == ([(0,), (2,), (4,)], [(0,), (3,)])
    assert assign_layers("average", 6, 3, 2) == ([(0, 1), (2, 3), (4, 5)], [(0, 1, 2), (3, 4, 5)])
    assert assign_layers("duplicate", 2, 2, 2) == ([(0,), (1,)], [(0,), (1,)])
    blocks, tokens = assign_layers("random", 8, 4, 4, seed=1)
    assert sorted(blocks + tokens) == [(i,) for i in range(8)]
    assert assign_layers("random", 8, 4, 4, seed=1) == (blocks, tokens) != assign_layers("random", 8, 4, 4, seed=2)


@pytest.mark.parametrize(("method", "sizes"), [("partition", (4, 2, 3)), ("skip", (5, 2, 2)), ("duplicate", (4, 4, 2))])
def test_assignments_that_do_not_fit(method: str, sizes: tuple[int, int, int]) -> None:
    with pytest.raises(
        CheckpointError, match=f"layer assignment {method} asks for .* the vanilla model has {sizes[0]}"
    ):
        assign_layers(method, *sizes)  # type: ignore[arg-type]


def test_averaged_layers_are_means(folders: dict[str, Path]) -> None:
    name = "attention.dense.weight"
    with open_vanilla_source(folders["partition"]) as vanilla:
        source = UptrainedSource(vanilla, target(), UptrainingOptions("average"))
        expected = (vanilla.read(f"vanilla.layers.2.{name}") + vanilla.read(f"vanilla.layers.3.{name}")) / 2
        torch.testing.assert_close(source.read(f"token_decoder.layers.1.{name}"), expected)
        assert source.origin(f"token_decoder.layers.1.{name}").startswith("mean of vanilla.layers.2.")


def test_computed_token_embeddings_are_states_of_lone_tokens(folders: dict[str, Path]) -> None:
    with open_vanilla_source(folders["partition"]) as vanilla:
        stage = filled(vanilla)
        source = UptrainedSource(vanilla, target(), UptrainingOptions("partition", token_embeddings="computed"))
        ids = torch.arange(VOCAB_SIZE)[:, None]
        inputs = prepare_inputs(vanilla.model, MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool)))
        with torch.no_grad():
            expected = stage.run(None, inputs, stage.names[:3])[0]
        torch.testing.assert_close(source.read("token_decoder.input.embedding.weight"), expected)
        assert "through vanilla layers 0 to 1" in source.origin("token_decoder.input.embedding.weight")


@pytest.mark.parametrize(("shorter", "longer"), [(1, 2), (1, 4), (2, 4)])
def test_longer_blocks_start_from_the_mean_of_their_parts(shorter: int, longer: int, folders: dict[str, Path]) -> None:
    with open_vanilla_source(folders["partition"]) as vanilla:
        before = UptrainedSource(vanilla, target(block_length=shorter), UptrainingOptions())
        after = GrownSource(before, target(block_length=longer))
        ids = torch.randint(1, VOCAB_SIZE, (2, NUM_BLOCKS * 4), generator=torch.Generator().manual_seed(3))
        batch = MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))
        embedded = []
        for source in (before, after):
            stage = filled(source)
            with torch.no_grad():
                embedded.append(stage.piece("embedder")(None, prepare_inputs(source.model, batch)))
        parts = embedded[0].unflatten(0, (-1, longer // shorter))
        torch.testing.assert_close(embedded[1], parts.mean(dim=1))
        assert dict(after.origins())["token_decoder.input.expansion.weight"] == "token_decoder.input.expansion.weight"


def _narrower(**options: int) -> DecoderConfig:
    return DecoderConfig(**({"num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2} | options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 256}, "vocab_size is 128 there and 256 here"),
        (
            {"token_decoder": _narrower(num_attention_heads=4)},
            "token_decoder.num_attention_heads is 2 there and 4 here",
        ),
        ({"block_decoder": _narrower(hidden_size=64)}, "block_decoder.hidden_size is 32 there and 64 here"),
        (
            {"block_decoder": _narrower(num_key_value_heads=1)},
            "block_decoder.num_key_value_heads is 2 there and 1 here",
        ),
        ({"block_decoder": _narrower(ffn_hidden_size=64)}, "block_decoder.ffn_hidden_size is 128 there and 64 here"),
        ({"backbone": {"norm": "rms_norm"}}, "backbone.norm is layer_norm there and rms_norm here"),
        ({"backbone": {"rotary_base": 5e5}}, "backbone.rotary_base is 10000.0 there and 500000.0 here"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is false there and true here"),
        ({"embedder": {"kind": "lookup"}}, "embedder.kind=lookup"),
        ({"block_decoder": _narrower(num_layers=1)}, "partition asks for 3 layers"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes: dict[str, object], message: str, folders: dict[str, Path]) -> None:
    with open_vanilla_source(folders["partition"]) as vanilla, pytest.raises(CheckpointError, match=message):
        UptrainedSource(vanilla, target(**changes), UptrainingOptions())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "computed does not go with model.tie_word_embeddings=true"),
        ({"block_length": 1}, "computed does not go with block_length=1"),
    ],
)
def test_embeddings_are_computed_only_into_a_table_of_their_own(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    tied = vanilla_folder(tmp_path / "tied", GOLDEN / "uptrain_partition" / "vanilla.safetensors", 4)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    options = UptrainingOptions(token_embeddings="computed")
    with open_vanilla_source(tied) as vanilla, pytest.raises(CheckpointError, match=message):
        UptrainedSource(vanilla, target(**changes), options)
