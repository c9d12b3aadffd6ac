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
from parallel.stage import build_stage
from parallel.topology import start_single_process
from tools.command_line import run
from train.config_file import load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "paper"


@dataclass(frozen=True)
class Reference:
    """What others reached.

    Attributes:
        tokens_per_second: decoding (CPU), or prompt and decoding (GPU).
        prompt_seconds: until the first new token, if known.
    """

    tokens_per_second: float | None
    prompt_seconds: float | None = None


@dataclass(frozen=True)
class Protocol:
    """Models, settings, batch sizes, and what the reference implementation reached.

    Attributes:
        losses: configuration -> loss of the paper's table.
        settings: prompt and new tokens.
        batch_sizes: of all points; the largest that fits is searched too on a GPU.
        searches: whether it is.
        references: (configuration, setting, batch size or None for the largest) -> reference.
    """

    losses: dict[str, float]
    settings: tuple[Setting, ...]
    batch_sizes: tuple[int, ...]
    searches: bool
    references: dict[tuple[str, Setting, int | None], Reference]


SHORT, LONG = Setting(128, 256), Setting(1024, 64)
ON_CPU = Protocol(
    losses={"block_main_b4_5": 3.578, "vanilla_31": 3.002},
    settings=(SHORT, LONG),
    batch_sizes=(1, 8, 32),
    searches=False,
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
    searches=True,
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
        speed = measured.tokens_per_second if protocol.searches else measured.decoding_tokens_per_second
        cells = [name, str(setting), str(measured.batch_size), f"{speed:,.0f}"]
        cells += ratio(reference.tokens_per_second, f"{reference.tokens_per_second:,.0f}", speed)
        cells.append(f"{measured.prompt_seconds:.3f}")
        known = reference.prompt_seconds
        cells += ["", ""] if known is None else ratio(1 / known, f"{known:.2f}", 1 / measured.prompt_seconds)
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def ratio(reference: float | None, shown: str, value: float) -> list[str]:
    """The reference, and how many times as fast the value is."""
    return ["", ""] if reference is None else [shown, f"{value / reference:.1f}"]


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
            for size in (*protocol.batch_sizes, *([None] if protocol.searches else [])):
                pair = [find(records, one, setting, size) for one in (name, closest)]
                if pair[0] is not None and pair[1] is not None:
                    times = pair[0].tokens_per_second / pair[1].tokens_per_second
                    lines.append(f"{name} / {closest}, {setting}, batch {size or 'best'}: {times:.2f}")
    return sorted(lines)


def main() -> None:
    """Measures, compares, reports."""
    parser = argparse.ArgumentParser(description="Measures generation against the reference implementation.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for all results")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each point (default 5)")
    arguments = parser.parse_args()
    device = compute_device()
    protocol, dtype = (ON_GPU, torch.bfloat16) if device.type == "cuda" else (ON_CPU, torch.float32)
    torch.set_num_threads(2)
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = RecordFile(arguments.output / "throughput.csv")
    limits = measure_device_limits(device, dtype)
    print(limits.describe(), flush=True)
    study = Study(limits, records, arguments.repeats, tell=lambda line: print(line, file=sys.stderr, flush=True))
    start_single_process()
    report = [limits.describe()]
    models = [candidate(name, loss, dtype) for name, loss in protocol.losses.items()]
    for model in models:
        study.run(model, protocol.settings, protocol.batch_sizes, 2**16)
        splits = study.run(model, protocol.settings, None, 2**16) if protocol.searches else {}
        report += ["", *walltime_table(model.name, splits)] if splits else []
    torch.distributed.destroy_process_group()
    found = list(records.records.values())
    report += ["", *measurement_table(found), "", *comparison(protocol, found), "", *block_to_vanilla(protocol, found)]
    print("\n".join(report))
    (arguments.output / "results.md").write_text("\n".join(report) + "\n", encoding="utf-8")
    draw_throughput(arguments.output, found, models, limits)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="prompt and new tokens")
    run(main, InferenceError)
