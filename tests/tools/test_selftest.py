"""tools/selftest.py as a user runs it, and what it makes of a layout that is wrong."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.errors import ConfigurationError
from train.selftest import WORLD_SIZES, Comparison, parity_matrix
from train.selftest_report import result_table, select_cases

ROOT = Path(__file__).resolve().parents[2]
SELFTEST = str(ROOT / "tools" / "selftest.py")


def comparison(**differences: float) -> Comparison:
    case = parity_matrix(2)[0]
    return replace(Comparison(case, loss=1e-7, norm=1e-7, gradient=1e-7, weight=1e-7, worst="a.weight"), **differences)


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, SELFTEST, "--cases", "dp2, zero 1"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    names = [case.name for case in parity_matrix(2) if case.name.startswith("DP2, ZeRO 1")]
    assert len(names) > 1
    lines = result.stdout.splitlines()
    assert lines[0] == f"PASS  {names[0]}", "no library chatter before"
    for name in names:
        assert f"PASS  {name}" in lines, "each case is reported as it finishes"
        assert [line for line in lines if line.startswith(name) and "PASS" in line], "and in the table"
    assert lines[-1] == f"{len(names)} of {len(names)} cases passed"


def test_alone_with_an_unknown_case(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, SELFTEST, "--cases", "TP9"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "error: no case for 1 processes has 'TP9' in its name; there are "
        f"{'; '.join(case.name for case in parity_matrix(1))}\n"
    )


@pytest.mark.slow
def test_a_failed_case_is_status_1(tmp_path: Path) -> None:
    """No layout reproduces another's rounding, so without tolerance it fails."""
    program = (
        "import sys, train.selftest, tools.selftest\n"
        "train.selftest.FP32_TOLERANCE = 0.0\n"
        "sys.argv[1:] = ['--cases', 'one process, ZeRO 0']\n"
        "sys.exit(tools.selftest.main())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stderr
    assert "FAIL  one process, ZeRO 0" in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == "0 of 1 cases passed"


def test_a_number_of_processes_without_cases() -> None:
    with pytest.raises(ConfigurationError, match="no cases for 3 processes; start 1, 2, 4, 8 of them"):
        select_cases(3)


def test_the_sizes_named_are_those_with_cases() -> None:
    assert [size for size in range(1, 65) if parity_matrix(size)] == list(WORLD_SIZES)


@pytest.mark.parametrize("kind", ["loss", "norm", "gradient", "weight"])
def test_table_shows_what_failed(kind: str) -> None:
    table = result_table([comparison(), comparison(**{kind: 2e-5})]).splitlines()
    assert table[0].split()[:6] == ["case", "loss", "norm", "gradient", "weight", "tolerance"]
    assert "PASS" in table[1]
    assert "FAIL" in table[2]
    assert "2.0e-05" in table[2]
    assert table[3] == "1 of 2 cases passed"
