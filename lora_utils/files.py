"""Bytes on disk: hashed, and written whole or not at all."""

import errno
import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import resource
except ImportError:  # Windows
    resource = None

PARTIAL_SUFFIX = ".partial"
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, on disk before it carries its name."""
    commit_file(path, lambda file: file.write(content))


def commit_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a new file, and give it its name when all of it is on disk.

    A process killed at any moment leaves the old file or the new one, and at most a ``.partial`` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            sync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet; its bytes are on disk when this returns."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def allow_many_open_files() -> None:
    """Raise the soft limit on open files, often 1024, to the hard one, where the system has such limits."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def sync(descriptor: int) -> None:
    """Wait until a file or folder is on disk, where its file system can say so: some mounted drives cannot."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Without this a power cut can lose the new name of a file whose bytes are safe."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
