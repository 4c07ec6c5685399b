"""Bytes on disk: hashed, and written whole or not at all.

What is being made carries a hidden name (``.partial-…``) until all of it is on disk; what is on its way out
(``.deleted-…``) and what is damaged (``.bad-…``) carry one as well, so nothing looks for them. A *committed
folder* holds plain files and a manifest of their sizes and hashes, and is read back before it counts.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO

from lora_utils import UserError
from lora_utils.system.portable import rename, replace, when_free

PARTIAL = ".partial-"
DELETED = ".deleted-"
BAD = ".bad-"
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

MANIFEST = "manifest.json"
SCHEMA = 1
MANIFEST_BYTES = 2**20


class DamagedError(UserError):
    """A folder is not what was committed."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there: what is asked for its disk."""
    absolute = path.absolute()
    return next(candidate for candidate in (absolute, *absolute.parents) if candidate.exists())


def beside(path: Path, prefix: str) -> Path:
    """A hidden name in the same folder that nobody has: PARTIAL, DELETED or BAD, then the path's own name."""
    return path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:8]}")


def delete(path: Path) -> None:
    """Delete a file or a folder; of a link the link alone.

    Raises:
        FileNotFoundError: It is gone.
    """
    is_folder = stat.S_ISDIR(path.lstat().st_mode)
    when_free(lambda: shutil.rmtree(path) if is_folder else path.unlink())


@contextmanager
def staged(path: Path, discard: Callable[[Path], None] = delete) -> Iterator[Path]:
    """A name to make ``path`` under; what still carries it at the end was not finished, and is discarded."""
    partial = beside(path, PARTIAL)
    try:
        yield partial
    finally:
        with suppress(
            OSError
        ):  # it has its real name by now; or the disk is away, and the next sweep finds it
            discard(partial)


def set_aside(path: Path) -> Path:
    """Give a damaged file or folder a name under which nothing looks for it, and keep it."""
    aside = rename(path, beside(path, BAD))
    sync_folder(path.parent)
    return aside


def remove(folder: Path) -> None:
    """Delete a folder; killed on the way, it is whole under its name, or litter."""
    delete(rename(folder, beside(folder, DELETED)))


def is_litter(name: str) -> bool:
    """Whether a name is one that a killed process leaves behind; earlier versions wrote
    ``.name.….partial``.
    """
    return name.startswith((PARTIAL, DELETED)) or (name.startswith(".") and name.endswith(".partial"))


def sweep(folder: Path, older_than_seconds: float = 0.0) -> None:
    """Delete what killed processes left behind in a folder that may not be there.

    Args:
        folder: Where to look; sub-folders are left alone.
        older_than_seconds: Younger litter may be another process' work, where several share the folder.
    """
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        if is_litter(name):
            with suppress(FileNotFoundError):  # another run's, that has its name by now
                if time.time() - (folder / name).lstat().st_mtime >= older_than_seconds:
                    delete(folder / name)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, on disk before it carries its name."""
    commit_file(path, lambda file: file.write(content))


def commit_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a new file, and give it its name when all of it is on disk.

    A process that is killed at any moment leaves the old file or the new one, and at most litter beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as partial:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            sync(file.fileno())
        replace(partial, path)
        sync_folder(path.parent)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet; its bytes are on disk when this returns."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def sync(descriptor: int) -> None:
    """Wait until a file or folder is on disk, where the file system can say so: mounted drives may not."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Without this a power cut can lose the new name of a file whose bytes are safe."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder; its file systems keep names in a journal of their own
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def commit_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder whole or not at all; on disk, and read back, when this returns.

    Args:
        folder: Must not exist yet.
        files: Plain names, without folders, to contents.

    Raises:
        OSError: It could not be written; nothing carries its name then.
        DamagedError: What was read back is not what was written; the folder was set aside.
    """
    # Of what is in memory: what the disk makes of it is compared afterwards.
    manifest = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder) as partial:
        partial.mkdir()
        for name, content in files.items():
            write_new(partial / name, content)
        # Last: a folder with a manifest has all of its files.
        write_new(partial / MANIFEST, json.dumps({"schema": SCHEMA, "files": manifest}, indent=1).encode())
        sync_folder(partial)
        rename(partial, folder)
    # The new name itself has to reach the disk, too.
    sync_folder(folder.parent)

    # A disk can take bytes and lose them: what cannot be read back now must not make an older folder go.
    if problem := problem_of(folder):
        set_aside(folder)
        raise DamagedError(f"{folder} was written, but does not read back: {problem}; check the disk")


def problem_of(folder: Path) -> str | None:
    """What is wrong with a committed folder, in a few words; None when every file is what was committed."""
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
            read_size = os.fstat(file.fileno()).st_size
            read_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        _compare(name, (read_size, read_sha256), (size, sha256))


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
                # A file of another size is damaged already, and may be larger than memory.
                contents[name] = file.read() if size == wanted[0] else b""
            _compare(name, (size, _sha256(contents[name])), wanted)
    except OSError as error:
        raise DamagedError(f"it cannot be read ({error.strerror})") from error
    return contents


def read_member(folder: Path, name: str) -> bytes:
    """One file of a committed folder, checked against the manifest; the others may be damaged.

    Raises:
        DamagedError: It is absent, cut short or changed; says what.
        OSError: It cannot be read now.
    """
    wanted = _manifest(folder).get(name)
    if wanted is None:
        raise DamagedError(f"{name} is missing")
    with _opened(folder, name) as file:
        content = file.read(wanted[0] + 1)
    _compare(name, (len(content), _sha256(content)), wanted)
    return content


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file; the manifest itself may be damaged or made to do harm."""
    with _opened(folder, MANIFEST) as file:
        # No more than a manifest can have: a file of gigabytes in its place must not fill the memory.
        content = file.read(MANIFEST_BYTES)
    try:
        manifest = json.loads(content)
        if manifest["schema"] != SCHEMA:
            raise DamagedError(f"{MANIFEST} has layout {manifest['schema']} instead of {SCHEMA}")
        files = manifest["files"]
        wanted = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DamagedError(f"{MANIFEST} is damaged") from None
    for name in wanted:
        # Nobody's manifest may make us read outside of its folder.
        if Path(name).name != name or name.startswith("."):
            raise DamagedError(f"{MANIFEST} names '{name}', which is no file of this folder")
    return wanted


def _opened(folder: Path, name: str) -> BufferedReader:
    path = folder / name
    try:
        # Path.is_file would take a drive that is away for an absence, and a pipe would wait for ever.
        is_file = stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    if not is_file:
        raise DamagedError(f"{name} is missing")
    return path.open("rb")


def _compare(name: str, read: tuple[int, str], wanted: tuple[int, str]) -> None:
    """Size and SHA-256 of a file against the manifest's; the size first, because it tells more."""
    if read[0] != wanted[0]:
        raise DamagedError(f"{name} has {read[0]:,} bytes instead of {wanted[0]:,}")
    if read[1] != wanted[1]:
        raise DamagedError(f"{name} is damaged")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
