import atexit
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.errors import DataError, MissingFileError
from data.streaming.transfer import Fetcher
from tests.data.streaming.faulty_server import STALL_SECONDS, FaultyServer

CONTENT = os.urandom(300_000)


def fetcher(location: str, attempts: int = 5, stall_seconds: float = 20.0) -> Fetcher:
    return Fetcher(location, attempts=attempts, stall_seconds=stall_seconds, first_wait_seconds=0.01)


def fetch(
    location: str, name: str = "a/file", *, attempts: int = 5, expected: bool = True, stall_seconds: float = 20.0
) -> bytes:
    return fetcher(location, attempts, stall_seconds).fetch(name, b"".join, expected=expected)


@pytest.fixture
def served(server: FaultyServer) -> FaultyServer:
    (server.folder / "a").mkdir()
    (server.folder / "a" / "file").write_bytes(CONTENT)
    return server


def test_a_transfer_survives_every_fault(served: FaultyServer, capfd: pytest.CaptureFixture[str]) -> None:
    served.faults["a/file"] = ["stall", "cut", "busy", "missing"]
    assert fetch(served.url, stall_seconds=STALL_SECONDS) == CONTENT
    assert served.requests["a/file"] == 5
    lines = capfd.readouterr().err.splitlines()
    begin = f"fetching a/file from {served.url}: "
    assert [line.removeprefix(begin).partition(";")[0] for line in lines] == [
        "no byte came for 1.5 s",
        "the connection was cut in mid-file (curl ended with status 18)",
        "no byte came for 1.5 s",
        "the server answers with an HTTP error, such as 404 for a file that is not there (curl ended with status 22)",
    ]
    assert [line.partition("; ")[2].rpartition(" in ")[0] for line in lines] == [
        f"attempt {n} of 5" for n in (2, 3, 4, 5)
    ]


def test_pauses_double_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempts themselves are real; only the pauses are left out."""
    waited: list[float] = []
    monkeypatch.setattr("data.streaming.transfer._exiting.wait", waited.append)
    with pytest.raises(DataError, match=r"\(9 attempts\)"):
        Fetcher("pipe:false {file}", attempts=9, stall_seconds=5).fetch("x", b"".join, expected=True)
    for seconds, expected in zip(waited, (1, 2, 4, 8, 16, 32, 60, 60), strict=True):
        assert expected <= seconds <= 1.25 * expected


def test_giving_up_says_what_where_and_how_often(served: FaultyServer) -> None:
    served.faults["a/file"] = ["cut"] * 5
    message = (
        rf"^a/file cannot be fetched from {served.url}: the connection was cut in mid-file \(curl ended with status "
        r"18\) \(2 attempts\); check data.path and the other side, or raise data.cache.attempts$"
    )
    with pytest.raises(DataError, match=message):
        fetch(served.url, attempts=2)
    with pytest.raises(DataError, match="the host refuses the connection"):
        fetch("http://127.0.0.1:1", attempts=1)


def test_a_file_that_may_be_missing_is_asked_for_once(served: FaultyServer) -> None:
    with pytest.raises(MissingFileError, match=r"a/other cannot be fetched .* 404 .*\(1 attempt\)"):
        fetch(served.url, "a/other", expected=False)
    served.faults["a/file"] = ["cut", "busy"]
    assert fetch(served.url, expected=False, stall_seconds=STALL_SECONDS) == CONTENT


def test_a_signature_stays_behind_the_path_and_out_of_messages(served: FaultyServer) -> None:
    location = served.url.replace("http://", "http://user:password@") + "/a/?signature=secret"
    assert fetch(location, "file") == CONTENT
    assert served.queries == {"signature=secret"}
    with pytest.raises(DataError) as caught:
        fetch(location, "other", expected=False)
    assert "secret" not in str(caught.value)
    assert "password" not in str(caught.value)


def test_commands(tmp_path: Path) -> None:
    (tmp_path / "it's a file").write_bytes(CONTENT)
    folder = shlex.quote(str(tmp_path))
    assert fetch(f"pipe:cat {folder}/{{file}}", "it's a file") == CONTENT
    assert fetch(f"pipe:cd {folder}; dd if={{file}} bs=1k 2>/dev/null | cat", "it's a file") == CONTENT
    # Awk's braces are its own.
    assert fetch("pipe:echo {file} | awk '{print $1}'", "name") == b"name\n"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("pipe:echo half of {file}; exit 3", r"the command ended with status 3 \(2 attempts\)"),
        ("pipe:kill -9 $$ # {file}", r"the command ended with signal 9 \(2 attempts\)"),
        ("pipe:exec 1>&-; sleep 9; : {file}", r"the transfer did not end for 1.5 s after its last byte"),
        ("pipe:no-such-program {file}", r"a program of this command is not installed here \(status 127\)"),
    ],
)
def test_commands_that_fail(location: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch(location, attempts=2, stall_seconds=STALL_SECONDS)


def test_a_stalled_command_ends_with_its_children(tmp_path: Path) -> None:
    command = f"sh -c 'echo $$ > {tmp_path}/child; sleep 60' | cat; : {{file}}"
    with pytest.raises(DataError, match="no byte came"):
        fetch(f"pipe:{command}", attempts=1, stall_seconds=STALL_SECONDS)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("pipe:cat corpus", r"^the command of pipe:cat corpus does not say .*; write \{file\} there"),
        (
            "ftp://host/corpus",
            r"^ftp://host/corpus cannot be fetched: known are http://, https://, s3://, gs:// and pipe:",
        ),
        ("http://u:secret@[::1/x?secret", r"^data.path \[::1/x is a malformed URL \(Invalid IPv6 URL\); correct it$"),
    ],
)
def test_locations_that_cannot_be(location: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetcher(location)


@pytest.mark.parametrize(("scheme", "program"), [("https", "curl"), ("s3", "aws"), ("gs", "gsutil")])
def test_a_missing_program_is_named(scheme: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=rf"^{scheme}://host needs the program {program}, .*; install {program}$"):
        fetcher(f"{scheme}://host")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs called aws and gsutil that serve a folder: what is tested is how we call them, not theirs."""
    programs, bucket = tmp_path / "programs", tmp_path / "bucket"
    programs.mkdir()
    (bucket / "corpus" / "a").mkdir(parents=True)
    (bucket / "corpus" / "a" / "file").write_bytes(CONTENT)
    for name, position, words in (("aws", 4, "s3 cp --only-show-errors $url -"), ("gsutil", 2, "cat $url")):
        check = f'url=${position}\n[ "$*" = "{words}" ] || exit 9\n'
        (programs / name).write_text(f'#!/bin/sh\n{check}exec cat "{bucket}/${{url#*://}}"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


@pytest.mark.usefixtures("bucket")
def test_object_stores_by_their_programs() -> None:
    for scheme, program in (("s3", "aws"), ("gs", "gsutil")):
        assert fetch(f"{scheme}://corpus/") == CONTENT
        with pytest.raises(MissingFileError, match=rf"from {scheme}://corpus: {program} ended with status 1 \(2 att"):
            fetch(f"{scheme}://corpus", "missing", attempts=2)


@pytest.mark.slow
def test_nothing_is_left_running_at_the_end_of_the_process(tmp_path: Path) -> None:
    """Neither by a thread in mid-transfer, nor by one in a pause; and the end does not wait for them."""
    program = (
        "import contextlib, os, threading, time\n"
        "from data.errors import DataError\n"
        "from data.streaming import transfer\n"
        "pause, paused = transfer._exiting.wait, threading.Event()\n"
        "transfer._exiting.wait = lambda seconds: (paused.set(), pause(seconds))\n"
        "def fetch(command):\n"
        "    fetcher = transfer.Fetcher(command + ' # {file}', attempts=9, stall_seconds=60, first_wait_seconds=60)\n"
        "    with contextlib.suppress(DataError):\n"
        "        fetcher.fetch('x', b''.join, expected=True)\n"
        f"for command in ('pipe:echo $$ > {tmp_path}/pid; sleep 60', 'pipe:false'):\n"
        "    threading.Thread(target=fetch, args=(command,), daemon=True).start()\n"
        "paused.wait()\n"
        f"while not (os.path.exists('{tmp_path}/pid') and open('{tmp_path}/pid').read()): time.sleep(0.01)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0
    assert result.stderr.count("\n") == result.stderr.count("attempt 2 of 9") == 1
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_forked_child_leaves_the_transfer_alone(tmp_path: Path) -> None:
    def read_with_a_fork_in_between(chunks: Iterator[bytes]) -> bytes:
        first = next(chunks)
        child = os.fork()
        if child == 0:
            atexit._run_exitfuncs()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return first + b"".join(chunks)

    command = "pipe:echo 1; sleep 0.25; echo 2 # {file}"
    assert fetcher(command, attempts=1).fetch("x", read_with_a_fork_in_between, expected=True) == b"1\n2\n"


def test_an_interrupt_ends_the_transfer(tmp_path: Path) -> None:
    def interrupt(chunks: Iterator[bytes]) -> None:
        next(chunks)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    location = f"pipe:echo $$ > {tmp_path}/pid; echo; sleep 60 # {{file}}"
    with pytest.raises(KeyboardInterrupt):
        fetcher(location).fetch("x", interrupt, expected=True)
    assert not is_running(int((tmp_path / "pid").read_text()))
