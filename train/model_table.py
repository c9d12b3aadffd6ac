"""The table of docs/models.md: every shipped configuration in one line, computed from the configuration itself."""

import re
from pathlib import Path

from parallel.config import ModelConfig
from parallel.costs import piece_costs, total_parameters
from parallel.errors import ConfigurationError
from train.config import RunConfig
from train.config_file import load_config

HEADER = (
    "| file | model | layers x width | L_B | non-embedding | total | context | batch | steps | tokens |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
START, END = "<!-- Written by tools/document_config.py from configs/. -->", "<!-- End of the table. -->"


def run_files(folder: Path) -> list[Path]:
    """The configurations of runs in a folder; those under base/ are only parts."""
    return [path for path in folder.rglob("*.yaml") if path.parent.name != "base"]


def non_embedding_parameters(model: ModelConfig) -> int:
    """Parameters as the paper counts a model's size: all decoder layers and the norms behind them."""
    layers = sum(cost.parameters for cost in piece_costs(model) if ".layers." in cost.name)
    norms = sum(cost.parameters - cost.split_parameters for cost in piece_costs(model) if cost.name.endswith(".output"))
    return layers + norms


def model_table(folder: Path) -> str:
    """A Markdown table of all configurations in a folder, related ones by size."""
    configs = [(path.relative_to(folder), load_config(path)) for path in run_files(folder)]
    return "\n".join((*HEADER, *(_row(path, config) for path, config in sorted(configs, key=_order))))


def with_table(document: str, folder: Path) -> str:
    """The document with the table between its two marks written anew.

    Raises:
        ConfigurationError: a mark is missing.
    """
    before, start, rest = document.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ConfigurationError(f"the document lacks the marks of its table, {START!r} and {END!r}; put them back")
    return f"{before}{START}\n{model_table(folder)}\n{END}{after}"


def _order(entry: tuple[Path, RunConfig]) -> tuple[Path, str, int, str]:
    path, config = entry
    family = re.match(r"[a-z_]+?(?=_b?\d|$)", path.stem)
    return path.parent, family.group() if family else path.stem, non_embedding_parameters(config.model), path.stem


def _row(path: Path, config: RunConfig) -> str:
    model, train = config.model, config.train
    tokens = config.tokens_per_step * train.last_step
    steps = f"{train.last_step:,}" + (f" of {train.steps:,}" if train.last_step < train.steps else "")
    cells = (
        f"`{path.with_suffix('').as_posix()}`",
        _kind(model),
        " + ".join(f"{stack.num_layers} x {stack.hidden_size}" for stack in model.stacks),
        str(model.block_length) if model.is_block else "",
        f"{non_embedding_parameters(model) / 1e6:.2f}M",
        f"{total_parameters(model) / 1e6:.2f}M",
        str(model.sequence_length),
        str(train.global_batch_size),
        steps,
        f"{tokens / 1e9:.1f}B" if tokens >= 1e9 else f"{tokens / 1e6:.1f}M",
    )
    return f"| {' | '.join(cells)} |"


def _kind(model: ModelConfig) -> str:
    if not model.is_block:
        return "vanilla"
    prefix = f" {model.prefix_length}" if model.token_decoder_input == "prefix" else ""
    return f"{model.embedder.kind}, {model.token_decoder_input}{prefix}"
