"""Which cases of the parity matrix a group of processes runs, and how their outcome is shown."""

from collections.abc import Sequence

from parallel.errors import ConfigurationError
from train.selftest import WORLD_SIZES, Case, Comparison, parity_matrix

COLUMNS = ("case", "loss", "norm", "gradient", "weight", "tolerance", "result", "worst tensor")


def select_cases(world_size: int, part: str = "") -> list[Case]:
    """Cases for a number of processes whose name contains a text.

    Args:
        world_size: number of processes.
        part: text to look for, whatever its case; empty for all.

    Raises:
        ConfigurationError: there are none; names what there is.
    """
    cases = parity_matrix(world_size)
    if not cases:
        sizes = ", ".join(map(str, WORLD_SIZES))
        raise ConfigurationError(f"there are no cases for {world_size} processes; start {sizes} of them")
    selected = [case for case in cases if part.lower() in case.name.lower()]
    if not selected:
        names = "; ".join(case.name for case in cases)
        raise ConfigurationError(f"no case for {world_size} processes has {part!r} in its name; there are {names}")
    return selected


def result_line(comparison: Comparison) -> str:
    """One finished case in one line."""
    return f"{_result(comparison)}  {comparison.case.name}"


def result_table(comparisons: Sequence[Comparison]) -> str:
    """All cases with their largest relative differences, and how many passed."""
    rows = [COLUMNS, *(_row(comparison) for comparison in comparisons)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    passed = sum(comparison.passed for comparison in comparisons)
    return "\n".join([*lines, f"{passed} of {len(comparisons)} cases passed"])


def _row(comparison: Comparison) -> tuple[str, ...]:
    case = comparison.case
    differences = (comparison.loss, comparison.norm, comparison.gradient, comparison.weight)
    # Losses and norms have one tolerance, single elements of tensors another.
    tolerance = f"{case.tolerance:.0e}"
    if case.tensor_tolerance != case.tolerance:
        tolerance += f" / {case.tensor_tolerance:.0e}"
    numbers = (f"{value:.1e}" for value in differences)
    return (case.name, *numbers, tolerance, _result(comparison), comparison.worst)


def _result(comparison: Comparison) -> str:
    return "PASS" if comparison.passed else "FAIL"
