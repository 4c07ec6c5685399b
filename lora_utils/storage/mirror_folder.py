"""The mirror as a folder: its names, what is read from it, and what is kept in it.

It may be a mount, such as Google Drive's, that fails for a while. So nothing here asks ``exists`` or
``is_dir`` of it, which take an error for an absence. A run's folder in it holds ``checkpoints`` and
``precomputed``.
"""

import errno
import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lora_utils import UserError
from lora_utils.precompute.cache import PACK_NAME
from lora_utils.storage.checkpoint import step_of
from lora_utils.storage.log import WEIGHTS_NAME
from lora_utils.system.files import (
    DELETED,
    DamagedError,
    beside,
    check_folder,
    is_litter,
    nearest_existing,
    read_folder,
)
from lora_utils.system.portable import rename

CHECKPOINTS = "checkpoints"
PRECOMPUTED = "precomputed"
KEPT = 2
RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Pauses after an error of the connection."""
LATE_SECONDS = (1.0, 3.0, 6.0)
"""Waits for a copy that is not whole; its files may become visible one by one."""
Read = TypeVar("Read")


class MirrorError(UserError):
    """The mirror cannot be used or read."""


def open_mirror(mirror_dir: Path) -> None:
    """Make sure that the folder is there; made only where its parent is, so that a mount is never faked.

    Raises:
        MirrorError: The parent is absent too.
        OSError: It cannot be read.
    """
    try:
        mirror_dir.mkdir(exist_ok=True)
    # Not with parents: an unmounted drive would come into being on the local disk, and be lost with it.
    except FileNotFoundError:
        raise MirrorError(
            f"mirror_dir {mirror_dir} does not exist; mount Google Drive first "
            "(from google.colab import drive; drive.mount('/content/drive')) or create the folder"
        ) from None
    os.listdir(mirror_dir)  # a mount that is broken shows it here


def when_visible(read: Callable[[], Read], path: Path) -> Read:
    """The result of reading a copy, tried again where it is not whole: it may become visible file by file.

    Raises:
        DamagedError: It stays so.
        MirrorError: It cannot be read.
    """
    for pause_seconds in LATE_SECONDS:
        try:
            return patiently(read, path)
        except DamagedError:
            time.sleep(pause_seconds)
    return patiently(read, path)


def patiently(read: Callable[[], Read], path: Path) -> Read:
    """The result of reading, tried again where the connection fails.

    Raises:
        MirrorError: It stays so; says what to do.
        OSError: The local disk is full.
    """
    for pause_seconds in RETRY_SECONDS:
        try:
            return read()
        except OSError as error:
            # Of the local disk: waiting does not help.
            if error.errno == errno.ENOSPC:
                raise
            time.sleep(pause_seconds)
    try:
        return read()
    except OSError as error:
        raise MirrorError(
            f"{path} cannot be read ({error.strerror or error}), although the mirror is there; mount the "
            "drive again (drive.mount('/content/drive', force_remount=True)) and run the same command. If "
            "that does not help, rename it in the drive to go on without it, or unset mirror_dir "
            "to start without the mirror"
        ) from error


def same_disk(mirror_dir: Path, output_dir: Path) -> bool:
    """Whether both are lost together; output_dir need not be there yet."""
    return os.stat(mirror_dir).st_dev == os.stat(nearest_existing(output_dir)).st_dev


def steps_in(checkpoints: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    names = sorted(os.listdir(checkpoints), reverse=True)
    return [checkpoints / name for name in names if step_of(name) is not None]


def packs_in(precomputed: Path) -> set[str]:
    """Names of the cache's packs."""
    return {name for name in os.listdir(precomputed) if PACK_NAME.match(name)}


def read_mounted(folder: Path) -> dict[str, bytes]:
    """``read_folder`` that tells a connection that failed from contents that are bad.

    Raises:
        DamagedError: The contents are bad, or absent.
        OSError: They cannot be read now.
    """
    try:
        return read_folder(folder)
    except DamagedError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from error
        # From Python 3.14 on, is_file says False where the mount is away; this does not.
        with suppress(FileNotFoundError, NotADirectoryError):
            os.listdir(folder)
        raise


def prune_copies(checkpoints: Path, step: int) -> None:
    """Delete what is older than the newest whole copies; ``step`` was just verified."""
    whole = 1
    for folder in steps_in(checkpoints):
        if (step_of(folder.name) or 0) >= step:
            continue
        if whole == KEPT:
            discard(folder)
        elif _is_whole(folder):
            whole += 1


def set_aside(run: Path, first_step: int) -> Path | None:
    """Move checkpoints from a step on, and the LoRA, into ``earlier-1`` (or -2, -3) in a run's folder.

    Args:
        run: The run's folder in the mirror.
        first_step: 0 moves all there is of the run, the LoRA even where it has no checkpoints.

    Returns:
        Where they are now; None where there was nothing to move.
    """
    names = os.listdir(run)
    checkpoints = steps_in(run / CHECKPOINTS) if CHECKPOINTS in names else []
    moved = [path.relative_to(run) for path in checkpoints if (step_of(path.name) or 0) >= first_step]
    # It is of the last of them.
    if WEIGHTS_NAME in names and (moved or not first_step):
        moved.append(Path(WEIGHTS_NAME))
    if not moved:
        return None
    candidates = (f"earlier-{number}" for number in itertools.count(1))
    aside = run / next(name for name in candidates if name not in names)
    aside.mkdir()
    (aside / CHECKPOINTS).mkdir()
    for path in moved:
        rename(run / path, aside / path)
    return aside


def discard(path: Path) -> None:
    """Delete a file or folder of ours, under another name first: nobody may read it half deleted."""
    delete_emptied(rename(path, beside(path, DELETED)))


def sweep_mirror(folder: Path) -> None:
    """Delete what was cut short, as far as that works: it takes space and nothing else."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if is_litter(name):
                with suppress(OSError):
                    delete_emptied(folder / name)


def delete_emptied(litter: Path) -> None:
    """Delete a file or folder, its files emptied first: Google Drive's bin counts against the quota."""
    is_folder = litter.is_dir()
    files = [litter / name for name in os.listdir(litter)] if is_folder else [litter]
    for file in files:
        if not file.is_symlink():  # truncating would empty what the link leads to
            os.truncate(file, 0)
        file.unlink()
    if is_folder:
        litter.rmdir()


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except DamagedError:
        return False
    return True
