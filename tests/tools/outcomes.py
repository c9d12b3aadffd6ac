"""What a tool's end must look like."""

import subprocess


def assert_one_clear_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Status 2 and one line for the user, which holds every part."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert part in errors[0], errors[0]
