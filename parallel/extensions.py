"""Where C++ extensions are built, DeepSpeed's and our own, and the recovery from a build that was killed.

torch guards each load with a file named ``lock`` that it keeps open and deletes at the end. A killed process leaves the
file behind, and every later one would wait for it forever. So loads are serialized by a lock of the system, which dies
with its process, also where processes cannot see each other, as in containers; whoever has it may clear the rest.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from parallel.errors import ConfigurationError
from parallel.processor import processor_entry

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
BUILD_TOOLS = {
    "g++": "install the package g++ (apt-get install g++)",
    "ninja": "install the package ninja (pip install ninja)",
}
# On a shared file system the builder may run on another machine, where its open files cannot be seen.
SHARED_LOCK_AGE_SECONDS = 600.0
LOCAL_FILE_SYSTEMS = frozenset({"btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"})


def use_extension_cache() -> Path:
    """Point torch at the project's extension cache, and let torch find ninja.

    Call it before DeepSpeed is imported. ``TORCH_EXTENSIONS_DIR`` wins if it is set already.

    Returns:
        The directory that holds one folder per extension.
    """
    _make_ninja_visible()
    default = REPOSITORY_ROOT / ".cache" / "torch_extensions" / _build_key()
    directory = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # A prebuilt cache on a read-only file system is still usable.
        if not directory.is_dir():
            print(f"warning: no extension cache at {directory}: {error.strerror}", file=sys.stderr)
    return directory


def check_communication_op() -> None:
    """Makes sure that DeepSpeed can load its CPU communication op: it is built already, or can be.

    Raises:
        ConfigurationError: it is not built, and a tool to build it is missing.
    """
    directory = use_extension_cache()
    tool = find_missing_tool()
    if tool is not None and not any(directory.glob("*shm_comm*/*.so")):
        raise ConfigurationError(
            f"DeepSpeed's CPU op is not built in {directory}, and {tool} is missing to build it: {BUILD_TOOLS[tool]}, "
            "then run tools/build_extensions.py"
        )


def load_communication_op() -> str:
    """Build DeepSpeed's shared-memory communication op if it is not there, and load it; DeepSpeed keeps it.

    Returns:
        What happened, in words.

    Raises:
        OSError: The cache cannot be written.
        RuntimeError: The compiler failed.
    """
    directory = use_extension_cache()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return f"nothing to build for the {accelerator.device_name()} accelerator"
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return "this platform uses gloo alone"
    started = time.monotonic()
    with one_at_a_time(directory):
        builder.load(verbose=False)
    return f"{builder.name} ready in {time.monotonic() - started:.0f} s"


def build_library(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Compiles a shared library into the cache, unless it is there.

    Args:
        name: of its folder in the cache.
        sources: files; those that end with .cpp are compiled.
        flags: of the compiler.

    Returns:
        The library, named by what it is made of.

    Raises:
        ConfigurationError: there is no compiler, it fails, or the cache cannot be written.
    """
    directory = use_extension_cache()
    digest = hashlib.sha256("\0".join((*flags, *(source.read_text() for source in sources))).encode()).hexdigest()[:16]
    library = directory / name / f"{digest}.so"
    if library.exists():
        return library
    if shutil.which("g++") is None:
        raise ConfigurationError(f"g++ is missing: {BUILD_TOOLS['g++']}, then run tools/build_extensions.py")
    with one_at_a_time(directory):
        if not library.exists():
            _compile([source for source in sources if source.suffix == ".cpp"], flags, library)
    return library


def _compile(sources: Sequence[Path], flags: Sequence[str], library: Path) -> None:
    """The library appears under its name when it is complete; see build_library."""
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = ["g++", *flags, "-fPIC", "-shared", "-o", str(unfinished), *map(str, sources)]
    try:
        library.parent.mkdir(exist_ok=True)
        subprocess.run(command, check=True, capture_output=True, text=True)
        unfinished.replace(library)
    except OSError as error:
        raise ConfigurationError(f"{library} cannot be written ({error.strerror}); set TORCH_EXTENSIONS_DIR") from None
    except subprocess.CalledProcessError as error:
        unfinished.unlink(missing_ok=True)
        reason = next((line for line in error.stderr.splitlines() if "error" in line), f"status {error.returncode}")
        raise ConfigurationError(f"g++ cannot compile {library.parent.name} ({reason}); use GCC 9 or newer") from None


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Keeps other processes from loading, and clears the locks of killed ones first."""
    with ExitStack() as stack:
        with suppress(OSError):  # a read-only cache, or a file system without locks
            guard = stack.enter_context(open(directory / ".loading", "w"))
            fcntl.flock(guard, fcntl.LOCK_EX)
            clear_stale_locks(directory)
        yield


def find_missing_tool() -> str | None:
    """Name of the first build tool that is not on the path, or None."""
    return next((tool for tool in BUILD_TOOLS if shutil.which(tool) is None), None)


def clear_stale_locks(directory: Path) -> list[Path]:
    """Remove build locks that no process holds.

    Args:
        directory: The extension cache, with one folder per extension.

    Returns:
        The lock files that were removed.
    """
    return [lock for lock in sorted(directory.glob("*/lock")) if _remove_if_stale(lock)]


def _make_ninja_visible() -> None:
    """A script started as .venv/bin/python does not have .venv/bin on its path, where pip puts ninja."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + sysconfig.get_path("scripts")


def _build_key() -> str:
    """Name of the cache for this Python, torch and processor: DeepSpeed compiles with -march=native."""
    flags = processor_entry("flags", "Features") or platform.processor()
    processor = platform.machine() + flags
    digest = hashlib.sha256(processor.encode()).hexdigest()[:8]
    return f"py{sys.version_info.major}{sys.version_info.minor}-torch{version('torch')}-{digest}"


def _remove_if_stale(lock: Path) -> bool:
    try:
        seen = lock.stat()
        if _is_held(seen) or not _visible_here(lock, seen):
            return False
        # A build that ended and another that began since then would have made a different file.
        now = lock.stat()
        if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
            return False
        lock.unlink()
    except FileNotFoundError:
        return False
    print(f"removed {lock}, left by a build that was killed", file=sys.stderr)
    return True


def _visible_here(lock: Path, status: os.stat_result) -> bool:
    """Whether a holder of the lock would have been seen: own process, this machine; else only after a long time."""
    if os.geteuid() not in (0, status.st_uid):
        return False
    local = _file_system(lock) in LOCAL_FILE_SYSTEMS
    return local or time.time() - status.st_mtime > SHARED_LOCK_AGE_SECONDS


def _is_held(status: os.stat_result) -> bool:
    """Whether any process of this machine has the file open."""
    wanted = (status.st_dev, status.st_ino)
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            descriptors = list(process.iterdir())
        except OSError:
            continue
        if any(_identity(descriptor) == wanted for descriptor in descriptors):
            return True
    return False


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _file_system(path: Path) -> str:
    """Type of the file system that holds a path, for example ``ext4`` or ``nfs``; empty if unknown."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    resolved = path.resolve()
    best, kind = -1, ""
    for mount in mounts:
        left, _, right = mount.partition(" - ")
        point = Path(left.split()[4].replace("\\040", " "))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    return kind
