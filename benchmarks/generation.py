"""Measures generation against the reference implementation: python benchmarks/generation.py --output DIR.

On CPU, two threads: the paper's 5M models, against what its reference implementation reached on two cores (fp32, eager
attention, a quiet machine). On a GPU: the paper's table (one H100, bf16), each at the largest batch size and at batch
size 1; with the least loss per model, so that speeds at equal loss can be compared.
"""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import warnings
from dataclasses import dataclass

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch
import torch.distributed

from evaluation.throughput.measurement import Measurement
from evaluation.throughput.records import Record, RecordFile
from evaluation.throughput.report import draw_throughput, measurement_table, walltime_table
from evaluation.throughput.study import Candidate, Setting, Study
from inference.errors import InferenceError
from parallel.config import ParallelConfig
from parallel.cpu_adaptation import compute_device
from parallel.device_limits import measure_device_limits
from parallel.errors import ConfigurationError
from parallel.stage import build_stage
from parallel.topology import start_single_process
from tools.command_line import make_output_folder, positive, run
from train.config_file import load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "paper"


@dataclass(frozen=True)
class Reference:
    """What others reached.

    Attributes:
        tokens_per_second: decoding (CPU), or prompt and decoding (GPU).
        prompt_seconds: until the first new token, if known.
    """

    tokens_per_second: float
    prompt_seconds: float | None = None


@dataclass(frozen=True)
class Protocol:
    """Models, settings, batch sizes, and what the reference implementation reached.

    Attributes:
        losses: configuration -> loss of the paper's table.
        settings: prompt and new tokens.
        batch_sizes: of all points.
        largest: the largest batch size that fits is searched up to this; None: not searched.
        references: (configuration, setting, batch size or None for the largest) -> reference.
    """

    losses: dict[str, float]
    settings: tuple[Setting, ...]
    batch_sizes: tuple[int, ...]
    largest: int | None
    references: dict[tuple[str, Setting, int | None], Reference]


SHORT, LONG = Setting(128, 256), Setting(1024, 64)
ON_CPU = Protocol(
    losses={"block_main_b4_5": 3.578, "vanilla_31": 3.002},
    settings=(SHORT, LONG),
    batch_sizes=(1, 8, 32),
    largest=None,
    references={
        ("block_main_b4_5", SHORT, 1): Reference(87),
        ("block_main_b4_5", SHORT, 8): Reference(362),
        ("block_main_b4_5", SHORT, 32): Reference(760, 0.19),
        ("block_main_b4_5", LONG, 32): Reference(682, 1.61),
        ("vanilla_31", SHORT, 1): Reference(62),
        ("vanilla_31", SHORT, 8): Reference(236),
        ("vanilla_31", SHORT, 32): Reference(470, 1.74),
        ("vanilla_31", LONG, 32): Reference(99, 34.8),
    },
)
PREFILL_HEAVY, DECODE_HEAVY = Setting(2048, 128), Setting(128, 2048)
ON_GPU = Protocol(
    losses={"vanilla_160": 2.476, "vanilla_410": 2.224, "block_main_b4_300": 2.445, "block_main_b4_1.2b": 2.188},
    settings=(PREFILL_HEAVY, DECODE_HEAVY),
    batch_sizes=(1,),
    largest=2**16,
    references={
        ("vanilla_160", PREFILL_HEAVY, None): Reference(2.3e3),
        ("vanilla_160", DECODE_HEAVY, None): Reference(6.2e3),
        ("vanilla_160", PREFILL_HEAVY, 1): Reference(216.26),
        ("vanilla_160", DECODE_HEAVY, 1): Reference(222.22),
        ("vanilla_410", PREFILL_HEAVY, None): Reference(0.8e3),
        ("vanilla_410", DECODE_HEAVY, None): Reference(2.1e3),
        ("vanilla_410", PREFILL_HEAVY, 1): Reference(115.24),
        ("vanilla_410", DECODE_HEAVY, 1): Reference(113.23),
        ("block_main_b4_300", PREFILL_HEAVY, None): Reference(21.0e3),
        ("block_main_b4_300", DECODE_HEAVY, None): Reference(44.1e3),
        ("block_main_b4_300", PREFILL_HEAVY, 1): Reference(158.34),
        ("block_main_b4_300", DECODE_HEAVY, 1): Reference(155.38),
        ("block_main_b4_1.2b", PREFILL_HEAVY, None): Reference(12.4e3),
        ("block_main_b4_1.2b", DECODE_HEAVY, None): Reference(25.7e3),
        ("block_main_b4_1.2b", PREFILL_HEAVY, 1): Reference(154.37),
        ("block_main_b4_1.2b", DECODE_HEAVY, 1): Reference(153.44),
    },
)


def candidate(name: str, loss: float, dtype: torch.dtype) -> Candidate:
    """A model of the paper with random weights."""
    config = load_config(CONFIGS / f"{name}.yaml").model
    return Candidate(name, config, lambda: build_stage(config, ParallelConfig(), dtype).eval(), loss)


def comparison(protocol: Protocol, records: list[Record]) -> list[str]:
    """A Markdown table of ratios to the reference."""
    rows = ["| model | prompt/new | batch | tokens/s | reference | ratio | prompt s | reference | ratio |"]
    rows.append("|---" * 9 + "|")
    for (name, setting, size), reference in protocol.references.items():
        measured = find(records, name, setting, size)
        if measured is None:
            continue
        speed = measured.tokens_per_second if protocol.largest else measured.decoding_tokens_per_second
        known, seconds = reference.tokens_per_second, reference.prompt_seconds
        cells = [name, str(setting), str(measured.batch_size), f"{speed:,.0f}", f"{known:,.0f}", f"{speed / known:.1f}"]
        cells.append(f"{measured.prompt_seconds:.3f}")
        cells += ["", ""] if seconds is None else [f"{seconds:.2f}", f"{seconds / measured.prompt_seconds:.1f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def find(records: list[Record], name: str, setting: Setting, size: int | None) -> Measurement | None:
    """The measurement of a point; of the fastest batch size if none is given."""
    found = [
        record.measurement
        for record in records
        if record.measurement is not None
        and record.point.model == name
        and (record.point.prompt_tokens, record.point.new_tokens) == (setting.prompt_tokens, setting.new_tokens)
        and size in (None, record.point.batch_size)
    ]
    return max(found, key=lambda one: one.tokens_per_second, default=None)


def block_to_vanilla(protocol: Protocol, records: list[Record]) -> list[str]:
    """How many times as fast the block models are, each against the vanilla model of the closest loss."""
    vanilla = {name: loss for name, loss in protocol.losses.items() if name.startswith("vanilla")}
    lines = []
    for name in protocol.losses.keys() - vanilla.keys():
        closest = min(vanilla, key=lambda other: abs(vanilla[other] - protocol.losses[name]))
        for setting in protocol.settings:
            for size in (*protocol.batch_sizes, *([None] if protocol.largest else [])):
                pair = [find(records, one, setting, size) for one in (name, closest)]
                if pair[0] is not None and pair[1] is not None:
                    times = pair[0].tokens_per_second / pair[1].tokens_per_second
                    lines.append(f"{name} / {closest}, {setting}, batch {size or 'best'}: {times:.2f}")
    return sorted(lines)


def run_protocol(protocol: Protocol, device: torch.device, dtype: torch.dtype, repeats: int, output: Path) -> list[str]:
    """Measures; returns the report. The model-parallel topology must be initialized."""
    records = RecordFile(output / "throughput.csv")
    limits = measure_device_limits(device, dtype)
    study = Study(limits, records, repeats, tell=lambda line: print(line, file=sys.stderr, flush=True))
    report = [limits.describe()]
    models = [candidate(name, loss, dtype) for name, loss in protocol.losses.items()]
    for model in models:
        splits = study.run(model, protocol.settings, protocol.batch_sizes, protocol.largest)
        report += ["", *walltime_table(model.name, splits)]
    found = records.on(limits, {model.name: model.config for model in models})
    draw_throughput(output, found, models, limits)
    return [
        *report,
        "",
        *measurement_table(found),
        "",
        *comparison(protocol, found),
        "",
        *block_to_vanilla(protocol, found),
    ]


def main() -> None:
    """Measures, compares, reports."""
    parser = argparse.ArgumentParser(description="Measures generation against the reference implementation.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for all results")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="timed runs of each point (default 5)")
    arguments = parser.parse_args()
    device = compute_device()
    protocol, dtype = (ON_GPU, torch.bfloat16) if device.type == "cuda" else (ON_CPU, torch.float32)
    torch.set_num_threads(2)
    make_output_folder(arguments.output)
    start_single_process()
    try:
        report = run_protocol(protocol, device, dtype, arguments.repeats, arguments.output)
    finally:
        torch.distributed.destroy_process_group()
    print("\n".join(report))
    (arguments.output / "results.md").write_text("\n".join(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="prompt and new tokens")
    run(main, ConfigurationError, InferenceError)
