"""Copies into a mounted folder that may lie about what it stored, such as Google Drive's.

A copy counts when it was read back under its own name with the hashes of its source; until then its name
starts with a dot. That fsync returned means little on such a mount, and some do not have it.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from lora_utils.precompute.examples import INDEX_NAME
from lora_utils.precompute.packs import Pack, PackError
from lora_utils.storage.mirror_folder import delete_emptied, discard, packs_in, sweep_mirror
from lora_utils.system.files import (
    DELETED,
    MANIFEST,
    DamagedError,
    beside,
    check_folder,
    file_hash,
    read_folder,
    staged,
    sync,
    sync_folder,
)
from lora_utils.system.portable import rename, replace

CHUNK_BYTES = 8 * 2**20
LATE_SECONDS = (0.5, 2.0)
"""Waits for what was written to become visible."""
RESERVED_BYTES = 2 * 2**30
"""Of the mirror's space, which the cache leaves to the checkpoints: it can be made anew, they cannot."""


def read_manifest(source: Path) -> bytes:
    """What a local folder says that it holds.

    Raises:
        DamagedError: It is gone.
    """
    try:
        return (source / MANIFEST).read_bytes()
    except OSError as error:
        raise DamagedError(f"{source} is gone") from error


def is_copy(folder: Path, manifest: bytes) -> bool:
    """Whether a folder of the mirror reads back as what this manifest describes.

    Raises:
        OSError: It cannot be read now.
    """
    try:
        for name in os.listdir(folder):
            forget_pages(folder / name)
        if (folder / MANIFEST).read_bytes() != manifest:
            return False
        check_folder(folder)
    except (DamagedError, FileNotFoundError, NotADirectoryError):
        return False
    return True


def copy_folder(source: Path, target: Path) -> None:
    """Copy a committed folder; what has the target's name is replaced, once the copy is verified.

    Raises:
        DamagedError: The source is gone or damaged.
        OSError: The copy failed, or does not read back.
    """
    manifest = read_manifest(source)
    files = read_folder(source)
    with staged(target, delete_emptied) as partial:
        partial.mkdir()
        for name, content in (*files.items(), (MANIFEST, manifest)):
            with (partial / name).open("xb") as file:
                file.write(content)
                file.flush()
                sync(file.fileno())
        # Checkpoints can be large, and to verify one is to read it once more.
        files = {}
        content = b""
        _wait_until(lambda: is_copy(partial, manifest), partial)
        # Two renames: a mounted drive cannot be trusted to replace a folder in one.
        with suppress(FileNotFoundError):
            rename(target, beside(target, DELETED))
        rename(partial, target)
    _sync_names(target.parent)
    _wait_until(lambda: is_copy(target, manifest), target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a finished file; where the same is there already, it is left.

    Raises:
        DamagedError: The source is gone.
        OSError: The copy failed, or does not read back.
    """
    try:
        file = source.open("rb")
    except FileNotFoundError as error:
        raise DamagedError(f"{source} is gone") from error
    with file:
        # Of the open file: its name may lead to another one by the time it is read.
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if _reads_as(target, sha256):
            return
        file.seek(0)
        _write(target, sha256, lambda copy: shutil.copyfileobj(file, copy, CHUNK_BYTES))


def write_content(content: bytes, target: Path) -> None:
    """Write a small file; what has its name is replaced, once it is verified.

    Raises:
        OSError: It could not be written, or does not read back.
    """
    _write(target, hashlib.sha256(content).hexdigest(), lambda copy: copy.write(content))


def _write(target: Path, sha256: str, fill: Callable[[IO[bytes]], object]) -> None:
    with staged(target, delete_emptied) as partial:
        with partial.open("xb") as copy:
            fill(copy)
            copy.flush()
            sync(copy.fileno())
        _wait_until(lambda: _reads_as(partial, sha256), partial)
        replace(partial, target)
    _sync_names(target.parent)
    _wait_until(lambda: _reads_as(target, sha256), target)


class CacheCopy:
    """Follows a cache folder: packs that come are copied, and packs that go are deleted after them."""

    def __init__(self, source: Path, target: Path) -> None:
        """Follow one folder into another.

        Args:
            source: The cache of the run, on the local disk.
            target: In the mirror; made when there is something to copy.
        """
        self._source = source
        self._target = target
        self._copied: set[str] = set()

    def advance(self) -> bool:
        """Copy one pack, or what is left to do after the last; True when the mirror has all.

        Raises:
            OSError: The copy failed, does not read back, or would take the checkpoints' space.
        """
        packs = packs_in(self._source) if self._source.is_dir() else set()
        if not packs:
            return True  # and the mirror's stay: a cache that is gone here was lost, not joined
        self._target.mkdir(exist_ok=True)
        for name in sorted(packs - self._copied):
            if self._bring(name):
                return False
        if (self._source / INDEX_NAME).is_file():
            copy_file(self._source / INDEX_NAME, self._target / INDEX_NAME)
        if packs_in(self._source) != packs:
            return False
        # Packs go after what they were joined into has come, so that the mirror never lacks a record.
        replaced = packs_in(self._target) - packs
        if replaced:
            keys = set().union(*(_keys(self._source / name) for name in packs))
            for name in replaced:
                # Of a cache that was larger on another machine, what is not here stays there.
                if _keys(self._target / name) <= keys:
                    discard(self._target / name)
        sweep_mirror(self._target)
        return True

    def _bring(self, name: str) -> bool:
        """Whether something had to be done; a pack's name is random and its bytes never change."""
        source = self._source / name
        target = self._target / name
        try:
            size_bytes = source.stat().st_size
            is_there = _size_of(target) == size_bytes
            if not is_there:
                self._require_space(size_bytes)
                copy_file(source, target)
        except (DamagedError, FileNotFoundError):
            if source.exists():
                raise
            return True  # joined to others meanwhile
        self._copied.add(name)
        return not is_there

    def _require_space(self, size_bytes: int) -> None:
        usage = shutil.disk_usage(self._target)
        # A mount that cannot tell says 0 in all.
        if usage.total and usage.free < size_bytes + RESERVED_BYTES:  # a mount that cannot tell says 0
            free_gib = usage.free / 2**30
            raise OSError(errno.ENOSPC, f"{free_gib:.1f} GiB free, which the cache leaves to checkpoints")


def _keys(path: Path) -> set[bytes]:
    """Names of a pack's records; none of a pack that is damaged."""
    try:
        pack = Pack(path)
    except PackError:
        return set()
    try:
        return set(pack.keys())
    finally:
        pack.close()


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _reads_as(path: Path, sha256: str) -> bool:
    try:
        forget_pages(path)
        return file_hash(path) == sha256
    except FileNotFoundError:
        return False


def _wait_until(holds: Callable[[], bool], path: Path) -> None:
    for pause_seconds in (*LATE_SECONDS, None):
        if holds():
            return
        if pause_seconds is None:
            raise OSError(errno.EIO, f"{path.name} does not read back as it was written")
        time.sleep(pause_seconds)


def forget_pages(path: Path) -> None:
    """Let the next read ask the mount, not the memory that holds what was just written."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _sync_names(folder: Path) -> None:
    with suppress(OSError):  # whether the copy is there, reading it will tell
        sync_folder(folder)
