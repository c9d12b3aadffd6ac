"""Build the C++ extensions that training and generation use on this machine, so that no run has to.

Usage: python tools/build_extensions.py
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from inference.cpu_kernels.library import build_kernels
from parallel.errors import ConfigurationError
from parallel.extensions import BUILD_TOOLS, find_missing_tool, load_communication_op, use_extension_cache


def main() -> int:
    """Build everything and report in a line each; generation can do without its own."""
    directory = use_extension_cache()
    tool = find_missing_tool()
    if tool is not None:
        print(f"error: {tool} not found, needed to build DeepSpeed's CPU op: {BUILD_TOOLS[tool]}", file=sys.stderr)
        return 2
    try:
        outcome = load_communication_op()
    except (OSError, RuntimeError) as error:
        print(f"error: building DeepSpeed's CPU op in {directory} failed: {error}", file=sys.stderr)
        return 2
    print(f"DeepSpeed extensions: {outcome}")
    try:
        print(f"generation kernels: {build_kernels()}")
    except ConfigurationError as error:
        print(f"warning: generation on CPU will go on slowly, without its C++ kernels: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
