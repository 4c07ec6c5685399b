"""Bytes on disk: hashed, and written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO

from lora_utils import UserError

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


MANIFEST = "manifest.json"
SCHEMA = 1
MANIFEST_BYTES = 2**20
PARTIAL, DELETED, BAD = ".partial-", ".deleted-", ".bad-"


class DamagedError(UserError):
    """A folder is not what was committed."""


def commit_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder whole or not at all; on disk, and read back, when this returns.

    Args:
        folder: Must not exist yet.
        files: Plain names, without folders, to contents.

    Raises:
        OSError: It could not be written; nothing carries its name then.
        DamagedError: What was read back is not what was written; the folder was set aside.
    """
    manifest = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        for name, content in files.items():
            write_new(partial / name, content)
        write_new(partial / MANIFEST, json.dumps({"schema": SCHEMA, "files": manifest}, indent=1).encode())
        sync_folder(partial)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    if problem := problem_of(folder):
        set_aside(folder)
        raise DamagedError(f"{folder} was written, but does not read back: {problem}; check the disk")


def problem_of(folder: Path) -> str | None:
    """What is wrong with a folder, in a few words; None when every file is what was committed."""
    try:
        check_folder(folder)
    except DamagedError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def check_folder(folder: Path) -> None:
    """Compare a committed folder with its manifest, file by file, a piece at a time.

    Raises:
        DamagedError: Something is absent, cut short or changed; says what.
        OSError: It cannot be read now.
    """
    for name, (size, sha256) in _manifest(folder).items():
        with _opened(folder, name) as file:
            found = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        _compare(name, found, (size, sha256))


def read_folder(folder: Path) -> dict[str, bytes]:
    """The contents of a committed folder's files, each checked against the manifest.

    Raises:
        DamagedError: Something is absent, cut short, changed or unreadable; says what.
    """
    contents = {}
    try:
        for name, wanted in _manifest(folder).items():
            with _opened(folder, name) as file:
                size = os.fstat(file.fileno()).st_size
                contents[name] = file.read() if size == wanted[0] else b""
            _compare(name, (size, _sha256(contents[name])), wanted)
    except OSError as error:
        raise DamagedError(f"it cannot be read ({error.strerror})") from error
    return contents


def set_aside(folder: Path) -> Path:
    """Give a folder a name under which nothing looks for it, and keep it."""
    aside = folder.with_name(f"{BAD}{folder.name}-{uuid.uuid4().hex[:8]}")
    folder.rename(aside)
    sync_folder(folder.parent)
    return aside


def remove(folder: Path) -> None:
    """Delete a folder; killed on the way, it is whole under its name, or litter."""
    litter = folder.with_name(f"{DELETED}{folder.name}-{uuid.uuid4().hex[:8]}")
    folder.rename(litter)
    shutil.rmtree(litter)


def sweep(parent: Path) -> None:
    """Delete what killed processes left behind; only one process may work in the folder."""
    for stray in parent.iterdir() if parent.is_dir() else []:
        if stray.name.startswith((PARTIAL, DELETED)) and stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray)


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file."""
    with _opened(folder, MANIFEST) as file:
        content = file.read(MANIFEST_BYTES)
    try:
        manifest = json.loads(content)
        if manifest["schema"] != SCHEMA:
            raise DamagedError(f"{MANIFEST} has layout {manifest['schema']} instead of {SCHEMA}")
        files = manifest["files"]
        wanted = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DamagedError(f"{MANIFEST} is damaged") from None
    for name in wanted:
        if Path(name).name != name or name.startswith("."):
            raise DamagedError(f"{MANIFEST} names '{name}', which is no file of this folder")
    return wanted


def _opened(folder: Path, name: str) -> BufferedReader:
    path = folder / name
    try:
        is_file = stat.S_ISREG(path.lstat().st_mode)  # is_file would take a drive that is away for an absence
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    if not is_file:
        raise DamagedError(f"{name} is missing")
    return path.open("rb")


def _compare(name: str, found: tuple[int, str], wanted: tuple[int, str]) -> None:
    if found[0] != wanted[0]:
        raise DamagedError(f"{name} has {found[0]:,} bytes instead of {wanted[0]:,}")
    if found[1] != wanted[1]:
        raise DamagedError(f"{name} is damaged")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
