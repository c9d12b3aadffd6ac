"""Every command of README.md works: taken from its `sh` blocks and run in a copy of the repository.

Long ones get overrides that make them short; what only a cluster has is checked as far as it goes without one. A
command that stands in the README and not here fails, and so does one that stands here only.
"""

import json
import lzma
import math
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard

from checkpoints.weights.huggingface_config import model_from_huggingface
from checkpoints.weights.huggingface_names import huggingface_rules
from checkpoints.weights.parameter_shapes import parameter_shapes
from parallel.extensions import use_extension_cache
from tests.mutations.run import copy_repository
from tests.train.small_run import EXAMPLES

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ".venv/bin/python"
PAPER_CONFIG = "configs/paper/block_main_b4_1.2b.yaml"
SHORT_RUN = " train.steps=2 optimizer.warmup_steps=1 validation.sequences=8"


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def bash(command: str, workspace: Path) -> str:
    result = subprocess.run(["bash", "-c", command], cwd=workspace, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def target(command: str, workspace: Path) -> None:
    """Only asks make what it would do: these targets install, run for long, or serve until interrupted."""
    assert command.startswith("make ")
    assert bash(command + " --dry-run", workspace)


def run(command: str, workspace: Path) -> None:
    bash(command, workspace)


def run_shortened(command: str, workspace: Path) -> None:
    assert "complete at step 2" in bash(command + SHORT_RUN, workspace)


def run_one_case(command: str, workspace: Path) -> None:
    assert "1 of 1 cases passed" in bash(command + " --cases 'ZeRO 3, micro-batch'", workspace)


def show_help(command: str, workspace: Path) -> None:
    """The part behind srun and its options; srun itself needs a cluster."""
    assert command.startswith("srun --")
    assert "usage: selftest.py" in bash(command[command.index(PYTHON) :] + " --help", workspace)


def check_job(command: str, workspace: Path) -> None:
    """The script is one that sbatch takes, and its configuration with these overrides is one that can run."""
    words = shlex.split(command)
    script = next(word for word in words[1:] if not word.startswith("--"))
    overrides = words[words.index(script) + 1 :]
    bash(f"bash -n {script}", workspace)
    assert (workspace / script).read_text().startswith("#!/usr/bin/env bash\n")
    assert "parameters: " in bash(
        shlex.join([PYTHON, "tools/pretrain.py", PAPER_CONFIG, *overrides, "--dry-run"]), workspace
    )


def uptrain_shortened(command: str, workspace: Path) -> None:
    """A tenth of 20 steps."""
    assert "complete at step 2" in bash(command + " train.steps=20 optimizer.warmup_steps=1", workspace)


def plan_uptraining(command: str, workspace: Path) -> None:
    """Reads the names and shapes of a model of Pythia's size; its weights are a hole in a file."""
    write_empty_pythia(workspace / "pythia-160m")
    plan = bash(command + " --dry-run", workspace)
    assert "steps: 57200" in plan
    assert "token_decoder.layers.5.attention.dense.weight <- vanilla.layers.11.attention.dense.weight" in plan


def import_tokens(command: str, workspace: Path) -> None:
    """Two thousand documents of three tokens in Megatron's format, of which about two go to validation."""
    documents = 2000
    tokens = np.arange(1, 1 + 3 * documents, dtype="<u2") % 500
    (workspace / "pile" / "tokens.bin").write_bytes(tokens.tobytes())
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1)  # version, uint16, sequences
    lengths, pointers = np.full(documents, 3, dtype="<i4"), np.arange(documents, dtype="<i8") * 6
    index = header + lengths.tobytes() + pointers.tobytes() + np.arange(documents + 1, dtype="<i8").tobytes()
    (workspace / "pile" / "tokens.idx").write_bytes(index)
    assert "train: " in bash(command, workspace)


def measure_shortened(command: str, workspace: Path) -> None:
    table = bash(command + " --settings 8/3 --batch-sizes 2 --repeats 1", workspace)
    assert "| mine-1 | 8/3 | 2 |" in table


PREPARE = f"{PYTHON} tools/prepare_data.py --input"
UPTRAIN = f"{PYTHON} tools/uptrain_from_vanilla.py --vanilla"
CONVERT = f"{PYTHON} tools/convert_checkpoint.py"
COVERAGE: dict[str, Callable[[str, Path], None]] = {
    "make pretrain": target,  # tests/test_quickstart.py runs it
    "make tensorboard": target,
    "make install": target,
    "make test-fast": target,
    "make test": target,
    "make lint": target,
    "make mutations": target,
    f'{PYTHON} tools/generate.py --checkpoint runs/quickstart --prompt "It was a" --max-new-tokens 64 '
    "--temperature 0.8": run,
    f"{PYTHON} tools/evaluate_model.py --checkpoint runs/quickstart": run,
    f"{PYTHON} tools/pretrain.py configs/quickstart.yaml --dry-run": run,
    f"{PYTHON} tools/train_tokenizer.py --input corpus/train.jsonl.zst --vocab-size 4096 "
    "--output runs/mine/tokenizer.model": run,
    f"{PREPARE} corpus/train.jsonl.zst --validation-input corpus/validation.jsonl.zst "
    "--tokenizer runs/mine/tokenizer.model --output runs/mine/shards": run,
    f"{PYTHON} tools/pretrain.py configs/quickstart.yaml run.name=mine-1 data.path=runs/mine/shards "
    "model.block_decoder.num_layers=4": run_shortened,
    f"{PYTHON} tools/pretrain.py configs/quickstart_vanilla.yaml": run_shortened,
    f"{UPTRAIN} runs/quickstart_vanilla --config configs/quickstart_uptrain.yaml": uptrain_shortened,
    f"{UPTRAIN} pythia-160m --config configs/paper/block_uptrain_b4_85_10.yaml": plan_uptraining,
    f"{CONVERT} runs/quickstart_vanilla exported/vanilla": run,
    f"{CONVERT} exported/vanilla runs/imported": run,
    f"{CONVERT} runs/quickstart_uptrain exported/block": run,
    ".venv/bin/torchrun --standalone --nproc-per-node 2 tools/selftest.py": run_one_case,
    f"srun --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 {PYTHON} tools/selftest.py": show_help,
    f"{PREPARE} pile/train-*.jsonl.zst --validation-input pile/validation.jsonl.zst "
    "--tokenizer tokenizer.json --output runs/pile/shards": run,
    f"{PYTHON} tools/pretrain.py {PAPER_CONFIG} --dry-run": run,
    f"{PYTHON} tools/generate.py --checkpoint runs/mine-1 --prompt-file prompt.txt --max-new-tokens 64 --top-p 0.95 "
    "--temperature 0.8 --stats": run,
    f"{PYTHON} tools/evaluate_model.py --checkpoint runs/mine-1 --tasks positions lambada_openai "
    "--documents corpus/validation.jsonl.zst --task-data tasks": run,
    f"{PYTHON} tools/measure_throughput.py runs/mine-1 configs/paper/vanilla_31.yaml --settings 128/256 "
    "--batch-sizes 1 8 32 --output runs/throughput": measure_shortened,
    f"{PYTHON} tools/inspect_data.py statistics runs/mine/shards": run,
    f"{PYTHON} tools/inspect_data.py step runs/mine-1 --step 2 --rank 0": run,
    f"{PYTHON} tools/import_megatron.py --input pile/tokens --validation-fraction 0.001 --tokenizer tokenizer.json "
    "--output runs/pile-tokens/shards": import_tokens,
    f"{PYTHON} tools/plan.py {PAPER_CONFIG} --gpus 16 --gpu h100-80g": run,
    "sbatch slurm/pretrain_block_1b.sh": check_job,
    "sbatch --nodes=4 --partition=gpu slurm/pretrain_block_1b.sh parallel.tensor=2 "
    "parallel.sequence_parallel=true": check_job,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the files that the commands speak of, and a quickstart run of two steps."""
    folder = tmp_path_factory.mktemp("readme") / "repository"
    copy_repository(folder)
    use_extension_cache()  # the copy must not build DeepSpeed's op again
    link_environment(folder / ".venv" / "bin")
    write_corpus(folder)
    quickstart = folder / "runs" / "quickstart-data"
    bash(
        f"{PREPARE} corpus/train.jsonl.zst --validation-input corpus/validation.jsonl.zst --tokenizer tokenizer.json "
        f"--output {quickstart}/shards",
        folder,
    )
    bash(f"{PYTHON} tools/pretrain.py configs/quickstart.yaml" + SHORT_RUN, folder)
    return folder


def link_environment(folder: Path) -> None:
    """Programs that start those of this environment; links would change the paths that an operator is built with."""
    folder.mkdir(parents=True)
    for name in ("python", "torchrun"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.prefix}/bin/{name}" "$@"\n')
        program.chmod(0o755)


def write_corpus(folder: Path) -> None:
    with lzma.open(EXAMPLES / "validation.jsonl.xz", "rt", encoding="utf-8") as books:
        text = json.loads(next(books))["text"]
    for name, part in (
        ("corpus/train", text[:200_000]),
        ("corpus/validation", text[-20_000:]),
        ("pile/train-0", text[:2_000]),
        ("pile/train-1", text[2_000:4_000]),
        ("pile/validation", text[-2_000:]),
    ):
        path = folder / f"{name}.jsonl.zst"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zstandard.compress(json.dumps({"text": part}).encode()))
    (folder / "prompt.txt").write_text(text[:100])
    (folder / "tasks").mkdir()
    (folder / "tasks" / "lambada_openai_test.jsonl").write_text(
        json.dumps({"text": " ".join(text[:300].split())}) + "\n"
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text[:50_000]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_empty_pythia(folder: Path) -> None:
    """Pythia-160M as Hugging Face has it, without its numbers."""
    config = {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = model_from_huggingface(config, None)
    shapes = parameter_shapes(model)
    header: dict[str, object] = {}
    size = 0
    for rule in huggingface_rules(model, "gpt_neox"):
        start, size = size, size + 2 * math.prod(shapes[rule.ours])
        header[rule.theirs[0]] = {"dtype": "F16", "shape": shapes[rule.ours], "data_offsets": [start, size]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def test_every_command_is_covered() -> None:
    assert sorted(set(commands())) == sorted(COVERAGE)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_command(command: str, workspace: Path) -> None:
    COVERAGE[command](command, workspace)


def test_links_lead_somewhere() -> None:
    for document in (
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ):
        path = ROOT / document
        for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{document}: {link}"
