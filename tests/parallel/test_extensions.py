import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.errors import ConfigurationError
from parallel.extensions import REPOSITORY_ROOT, build_library, clear_stale_locks, use_extension_cache


def test_a_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert clear_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_lock_held_by_a_live_build_stays_and_goes_after_the_kill(tmp_path: Path) -> None:
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print(1, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert clear_stale_locks(tmp_path) == []
    assert lock.exists()
    holder.kill()
    holder.wait()
    assert clear_stale_locks(tmp_path) == [lock]


LOADING = """
import os, sys, time
from pathlib import Path
from parallel.extensions import one_at_a_time
directory = Path(sys.argv[1])
for _ in range(20):
    with one_at_a_time(directory):
        lock = os.open(directory / "some_op" / "lock", os.O_CREAT | os.O_EXCL)
        time.sleep(0.01)
        os.close(lock)
        os.remove(directory / "some_op" / "lock")
"""


def test_processes_that_cannot_see_each_other_do_not_remove_each_others_locks(tmp_path: Path) -> None:
    """As in containers: each has a process namespace of its own."""
    (tmp_path / "some_op").mkdir()
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = ["unshare", "--map-root-user", "--user", "--pid", "--fork", "--mount-proc"]
    command = [*alone, sys.executable, "-c", LOADING, str(tmp_path)]
    loaders = [subprocess.Popen(command, cwd=REPOSITORY_ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for loader in loaders:
        assert loader.communicate()[1] == ""
        assert loader.returncode == 0


def test_the_cache_lies_in_the_repository_unless_the_user_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    default = use_extension_cache()
    assert default.is_relative_to(REPOSITORY_ROOT / ".cache")
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(default)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert use_extension_cache() == tmp_path / "mine"
    assert (tmp_path / "mine").is_dir()


def test_ninja_of_the_environment_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    use_extension_cache()
    assert subprocess.run(["ninja", "--version"], capture_output=True, check=True).stdout


def test_building_without_a_compiler_is_one_line(tmp_path: Path) -> None:
    script = REPOSITORY_ROOT / "tools" / "build_extensions.py"
    environment = os.environ | {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [line for line in result.stderr.splitlines() if line.startswith("error: g++")]
    assert "apt-get install g++" in result.stderr


def test_a_cache_that_cannot_be_written_is_one_line() -> None:
    script = REPOSITORY_ROOT / "tools" / "build_extensions.py"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": "/proc/cache", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: building DeepSpeed's CPU op in /proc/cache failed" in result.stderr.splitlines()[-1]


def test_a_library_is_compiled_once_and_again_when_its_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')

    def build(answer: str) -> Path:
        header.write_text(f"#define ANSWER {answer}\n")
        return build_library("answer", [source, header], ["-O0"])

    first = build("1")
    built = first.stat()
    assert ctypes.CDLL(str(first)).answer() == 1
    assert ctypes.CDLL(str(build("2"))).answer() == 2
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert build("1") == first
        with pytest.raises(ConfigurationError, match=r"g\+\+ is missing: install .* run tools/build_extensions.py"):
            build("3")
    assert first.stat().st_mtime_ns == built.st_mtime_ns
    with pytest.raises(ConfigurationError, match=r"g\+\+ cannot compile answer \(.*error: .*\)"):
        build("nothing known")
    assert len(list((tmp_path / "cache" / "answer").iterdir())) == 2, "what failed leaves nothing"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/cache")
    with pytest.raises(ConfigurationError, match=r"/proc/cache.* cannot be written"):
        build("4")
