"""Measurements as tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.plots import can_plot, figure
from evaluation.throughput.batch_search import Trial, bytes_per_sequence
from evaluation.throughput.measurement import Measurement
from evaluation.throughput.records import Record
from evaluation.throughput.study import Candidate, Setting
from parallel.device_limits import DeviceLimits

HEADER = (
    "| model | prompt/new | batch | tokens/s | prompt s | decoding tokens/s | of roofline | prompt of roofline "
    "| MFLOP/token | MB/token | memory MiB/sequence | cache MiB/sequence | formula |"
)
MEBIBYTE = 2**20


def measurement_table(records: Sequence[Record]) -> list[str]:
    """A Markdown table, one row for each point."""
    memory = _memory_per_sequence(records)
    rows = [HEADER, "|---|" + "---|" * (HEADER.count("|") - 2)]
    for record in records:
        point, measured = record.point, record.measurement
        start = f"| {point.model} | {point.prompt_tokens}/{point.new_tokens} | {point.batch_size} |"
        if measured is None:
            rows.append(f"{start} does not fit" + " |" * (HEADER.count("|") - 4))
        else:
            rows.append(f"{start} {' | '.join(_cells(measured, memory[_series(record)]))} |")
    return rows


def _cells(measured: Measurement, memory: float) -> list[str]:
    return [
        f"{measured.tokens_per_second:,.1f}",
        f"{measured.prompt_seconds:.3f}",
        f"{measured.decoding_tokens_per_second:,.1f}",
        f"{measured.roofline:.0%}",
        f"{measured.prompt_roofline:.0%}",
        f"{measured.flops_per_token / 1e6:,.1f}",
        f"{measured.moved_bytes_per_token / 1e6:,.2f}",
        # Less than keys and values take: so few sequences are lost in what the process takes and gives back anyway.
        f"{memory / MEBIBYTE:,.2f}" if memory >= measured.cache_bytes_per_sequence else "-",
        f"{measured.cache_bytes / measured.batch_size / MEBIBYTE:,.3f}",
        f"{measured.cache_bytes_per_sequence / MEBIBYTE:,.3f}",
    ]


def _series(record: Record) -> tuple[str, int, int]:
    return record.point.model, record.point.prompt_tokens, record.point.new_tokens


def _memory_per_sequence(records: Sequence[Record]) -> dict[tuple[str, int, int], float]:
    trials: dict[tuple[str, int, int], list[Trial]] = {}
    for record in records:
        if record.measurement is not None:
            trial = Trial(record.point.batch_size, record.measurement.peak_bytes)
            trials.setdefault(_series(record), []).append(trial)
    return {name: bytes_per_sequence(found) for name, found in trials.items()}


def walltime_table(name: str, splits: Mapping[Setting, Mapping[str, float]]) -> list[str]:
    """A Markdown table of milliseconds by component."""
    components = dict.fromkeys(component for split in splits.values() for component in split)
    rows = ["| " + " | ".join([f"{name}: ms by component", *map(str, splits)]) + " |", "|---|" + "---|" * len(splits)]
    for component in components:
        cells = [f"{split.get(component, 0.0) * 1e3:,.1f}" for split in splits.values()]
        rows.append("| " + " | ".join([component, *cells]) + " |")
    return rows


def draw_throughput(
    folder: Path, records: Sequence[Record], candidates: Sequence[Candidate], limits: DeviceLimits
) -> list[Path]:
    """Plots throughput against batch size, and, where losses are known, the best throughput against loss."""
    if not can_plot() or not any(record.measurement for record in records):
        return []
    settings = list(dict.fromkeys(_series(record)[1:] for record in records))
    drawn = [folder / "throughput_by_batch_size.png"]
    with figure(drawn[0], len(settings)) as (_, axes):
        for axis, setting in zip(axes, settings, strict=True):
            for candidate in candidates:
                _draw_series(axis, records, (candidate.name, *setting))
            axis.set(title=f"{setting[0]}/{setting[1]} on {limits.device}", xlabel="sequences at a time")
            axis.set(ylabel="new tokens/s", xscale="log", yscale="log")
            axis.legend()
    known = [candidate for candidate in candidates if candidate.loss is not None]
    if known:
        drawn.append(folder / "throughput_by_loss.png")
        _draw_by_loss(drawn[1], records, known, settings)
    return drawn


def _speeds(records: Sequence[Record], series: tuple[str, int, int]) -> list[tuple[int, float]]:
    return sorted(
        (record.point.batch_size, record.measurement.tokens_per_second)
        for record in records
        if record.measurement is not None and _series(record) == series
    )


def _draw_series(axis: object, records: Sequence[Record], series: tuple[str, int, int]) -> None:
    speeds = _speeds(records, series)
    if speeds:
        sizes, values = zip(*speeds, strict=True)
        axis.plot(sizes, values, marker="o", label=series[0])  # type: ignore[attr-defined]


def _draw_by_loss(
    path: Path, records: Sequence[Record], candidates: Sequence[Candidate], settings: Sequence[tuple[int, ...]]
) -> None:
    with figure(path, len(settings)) as (_, axes):
        for axis, setting in zip(axes, settings, strict=True):
            for candidate in candidates:
                speeds = _speeds(records, (candidate.name, setting[0], setting[1]))
                if speeds:
                    best = max(speed for _, speed in speeds)
                    marker = "o" if candidate.config.is_block else "s"
                    axis.plot([candidate.loss], [best], marker=marker, linestyle="none", label=candidate.name)
            axis.set(title=f"{setting[0]}/{setting[1]}", xlabel="loss", ylabel="new tokens/s at the best batch size")
            axis.set_yscale("log")
            axis.legend()
