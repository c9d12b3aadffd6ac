"""Build the C++ extensions that DeepSpeed needs on this machine, so that no run has to.

Usage: python tools/build_extensions.py
"""

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from parallel.extensions import BUILD_TOOLS, find_missing_tool, use_extension_cache


def build_communication_op() -> str:
    """Build and load DeepSpeed's shared-memory communication op.

    Returns:
        What happened, in words.

    Raises:
        OSError: The cache cannot be written.
        RuntimeError: The compiler failed.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return f"nothing to build for the {accelerator.device_name()} accelerator"
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return "this platform uses gloo alone"
    started = time.monotonic()
    builder.load(verbose=False)
    return f"{builder.name} ready in {time.monotonic() - started:.0f} s"


def main() -> int:
    """Build everything and report in one line."""
    directory = use_extension_cache()
    tool = find_missing_tool()
    if tool is not None:
        print(f"error: {tool} not found, needed to build DeepSpeed's CPU op: {BUILD_TOOLS[tool]}", file=sys.stderr)
        return 2
    try:
        outcome = build_communication_op()
    except (OSError, RuntimeError) as error:
        print(f"error: building DeepSpeed's CPU op in {directory} failed: {error}", file=sys.stderr)
        return 2
    print(f"DeepSpeed extensions: {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
