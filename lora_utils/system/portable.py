"""What Linux, macOS and Windows do differently, each under the name of what is wanted.

Windows refuses to rename, replace or delete a file that any process has open, and a folder above it; a virus
scanner or an indexer opens what was just written, and lets go of it moments later. It has no pread, cannot
open a folder, and its os.open reads text unless it is told otherwise. macOS takes no limit of open files
above its own, though it says that there is none.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

try:
    import resource
except ImportError:  # Windows
    resource = None

Result = TypeVar("Result")
PAUSES_SECONDS = (0.05, 0.2, 0.5)
"""Until whoever has a file open lets go of it; long enough for scanners, short where the refusal is meant."""
MACOS_OPEN_FILES = 10240
"""OPEN_MAX of its sys/syslimits.h."""


def open_descriptor(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a file for reading its bytes; a pipe in its place does not wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of an open file, fewer at its end; on Windows one thread at a time may ask."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


def rename(path: Path, target: Path) -> Path:
    """Give a file or folder a name that nothing has; returns the target."""
    return when_free(lambda: path.rename(target))


def replace(path: Path, target: Path) -> Path:
    """Give a file a name that another file may have; returns the target."""
    return when_free(lambda: path.replace(target))


def when_free(action: Callable[[], Result]) -> Result:
    """The action's result, tried again for a moment where it is not permitted.

    Raises:
        PermissionError: It stays so.
    """
    for pause_seconds in PAUSES_SECONDS:
        try:
            return action()
        except PermissionError:
            time.sleep(pause_seconds)
    return action()


def allow_many_open_files() -> None:
    """Raise the soft limit on open files, often 256 or 1024, as far as it goes; Windows has none."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MACOS_OPEN_FILES), hard))
