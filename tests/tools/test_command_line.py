"""How tools end."""

import os
import signal
import time

import pytest

from parallel.errors import ConfigurationError
from tools.command_line import run


def interrupted_inside_a_library() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        raise TypeError("cannot convert") from None


def test_ctrl_c_that_a_library_turned_into_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        run(interrupted_inside_a_library)
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def mistaken() -> None:
    raise ConfigurationError("model.vocab_size=0 is too small")


def test_errors_of_users_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(mistaken, ConfigurationError)
    assert capsys.readouterr().err == "error: model.vocab_size=0 is too small\n"
    with pytest.raises(ConfigurationError):
        run(mistaken)
