"""Rules of the repository that no linter knows."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import tools.pretrain

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "tools": 5,
    "slurm": 4,
    "train": 3,
    "evaluation": 3,
    "checkpoints": 2,
    "inference": 2,
    "parallel": 1,
    "data": 1,
}
MAXIMUM_FILE_LINES = 500
MAXIMUM_FUNCTION_LINES = 60
TEXT_SUFFIXES = {".py", ".md", ".sh", ".yaml", ".toml", ".txt"}
# Split, so that this file does not contain what it forbids.
FORBIDDEN = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")


def python_files() -> list[Path]:
    folders = [*FLOORS, "tests", "benchmarks", "examples"]
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def text_files() -> list[Path]:
    folders = [*FLOORS, "tests", "benchmarks", "examples", "docs", "configs", ".ci"]
    nested = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in (*ROOT.iterdir(), *nested) if path.is_file() and path.suffix in TEXT_SUFFIXES)


def tool_scripts() -> list[Path]:
    scripts = sorted((ROOT / "tools").glob("*.py"))
    return [path for path in scripts if '__name__ == "__main__"' in path.read_text()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_packages(tree: ast.AST, own: str) -> Iterator[str]:
    """Top-level packages of ours that a module imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [own if node.level else node.module or ""]
        else:
            continue
        yield from (name.partition(".")[0] for name in names if name.partition(".")[0] in FLOORS)


@pytest.mark.parametrize("package", FLOORS)
def test_imports_run_downwards(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for imported in imported_packages(ast.parse(path.read_text()), package):
            if imported != package and FLOORS[imported] >= FLOORS[package]:
                wrong.append(f"{relative(path)} imports {imported}")
    assert not wrong


def test_packages_match_folders() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    folders = {
        relative(path.parent).replace("/", ".") for name in FLOORS for path in (ROOT / name).rglob("__init__.py")
    }
    assert listed == folders
    unmarked = {relative(path.parent) for name in FLOORS for path in (ROOT / name).rglob("*.py")}
    assert {name.replace("/", ".") for name in unmarked} <= folders


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout: nothing to ask"
)
def test_gitignore_hides_outputs_and_no_source() -> None:
    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT).returncode == 0

    sources = [relative(path) for path in python_files()]
    sources += ["data/new_module.py", "checkpoints/new_module.py", "configs/new/model.yaml", "slurm/pretrain.sh"]
    assert [path for path in sources if ignored(path)] == []
    outputs = ["runs/x/config.yaml", ".venv/bin/python", ".cache/x", "data/__pycache__/x.pyc", "x.egg-info/PKG-INFO"]
    assert [path for path in outputs if not ignored(path)] == []


def bootstrap_source(script: Path) -> str:
    """The statements of a script that stand before its first import of a package of ours."""
    prefix = []
    for statement in ast.parse(script.read_text()).body:
        if isinstance(statement, ast.Import | ast.ImportFrom) and any(imported_packages(statement, "tools")):
            break
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            break
        prefix.append(statement)
    return ast.unparse(ast.Module(body=prefix, type_ignores=[]))


@pytest.mark.parametrize("script", tool_scripts(), ids=lambda path: path.name)
def test_a_script_sees_the_packages_and_not_its_own_folder(script: Path, tmp_path: Path) -> None:
    """Run the script's own bootstrap in a copy of the layout, where tools/checkpoints.py would shadow the package."""
    for folder in ("tools", "checkpoints", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tools" / "checkpoints.py").write_text("raise SystemExit('the tools folder shadows a package')\n")
    (tmp_path / "checkpoints" / "__init__.py").touch()
    probe = "import sys, checkpoints\nprint(sys.path[0])\nprint(checkpoints.__file__)\n"
    copy = tmp_path / "tools" / script.name
    copy.write_text(bootstrap_source(script) + "\n" + probe)
    result = subprocess.run([sys.executable, "-E", copy], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path), str(tmp_path / "checkpoints" / "__init__.py")]


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < MAXIMUM_FILE_LINES
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > MAXIMUM_FUNCTION_LINES} == {}


def test_no_notes_to_self() -> None:
    found = [
        f"{relative(path)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


def shipped_configs() -> list[Path]:
    """All files of configs/ but those that only others build on."""
    return sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "base")


@pytest.mark.parametrize("path", shipped_configs(), ids=relative)
def test_shipped_configs_can_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder, since paths in a configuration start at the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(path), "--dry-run"])
    assert tools.pretrain.main() == 0
    printed = capsys.readouterr().out
    assert re.search(r"^parameters: \d+$", printed, flags=re.MULTILINE)
    run = yaml.safe_load(printed.partition("\n\n")[0])["run"]
    assert run["root"] == str(ROOT / "runs")
    assert run["name"] == path.stem


def test_every_base_of_configs_is_used() -> None:
    used: set[Path] = set()
    for path in (ROOT / "configs").rglob("*.yaml"):
        bases = yaml.safe_load(path.read_text()).get("base", [])
        used |= {(path.parent / base).resolve() for base in ([bases] if isinstance(bases, str) else bases)}
    assert set((ROOT / "configs" / "base").iterdir()) <= used
