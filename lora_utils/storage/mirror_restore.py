"""Brings a run back from the mirror onto a machine that has nothing of it.

Copies that are damaged are named and left where they are. What cannot be read is never taken for absent: a
run that silently starts anew has lost what the mirror is for.
"""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_utils.config.training import CheckpointConfig
from lora_utils.precompute.examples import INDEX_NAME, IndexFileError, read_index
from lora_utils.precompute.packs import Pack, PackError
from lora_utils.storage.checkpoint import step_of
from lora_utils.storage.mirror_folder import (
    CHECKPOINTS,
    PRECOMPUTED,
    MirrorError,
    open_mirror,
    packs_in,
    read_mounted,
    steps_in,
)
from lora_utils.system.files import DamagedError, commit_folder, staged, write_atomically
from lora_utils.system.portable import replace

LOGGER = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0)
"""Pauses after an error of the connection."""
LATE_SECONDS = (1.0, 3.0, 6.0)
"""Waits for a copy that is not whole; its files may become visible one by one."""
Read = TypeVar("Read")


@dataclass(frozen=True)
class Restored:
    """What came back from the mirror."""

    step: int | None
    """Of the checkpoint; None where the mirror had none yet."""
    packs: int
    """Of the cache."""
    skipped: tuple[str, ...]
    """A sentence for each copy that was not whole, and was left in the mirror."""


def restore(mirror_dir: Path, output_dir: Path, cache_folder: Path) -> Restored | None:
    """Copy the newest whole checkpoint and the cache from the mirror; None where there is nothing to do.

    A run folder that has checkpoints is left alone.

    Raises:
        MirrorError: The mirror is absent or cannot be read, or none of its checkpoints is whole; says what to
            do.
        OSError: The local disk failed or is full.
    """
    _patiently(lambda: open_mirror(mirror_dir), mirror_dir)
    local = output_dir / CHECKPOINTS
    run = mirror_dir / output_dir.resolve().name
    if local.is_dir() and steps_in(local):
        return None
    inside = _names(run) if run.name in _names(mirror_dir) else []

    packs = 0
    left_out: list[str] = []
    if PRECOMPUTED in inside:
        packs, left_out = _restore_cache(run / PRECOMPUTED, cache_folder)
    # The checkpoint comes last: killed on the way, a run folder that still lacks it is restored anew.
    step = None
    skipped: list[str] = []
    if CHECKPOINTS in inside:
        step, skipped = _restore_checkpoint(run / CHECKPOINTS, local)
    if step is None and not packs and not left_out:
        return None
    return Restored(step, packs, (*skipped, *left_out))


def _restore_checkpoint(mirrored: Path, local: Path) -> tuple[int | None, list[str]]:
    skipped = []
    for folder in _patiently(lambda: steps_in(mirrored), mirrored):
        try:
            files = _when_visible(lambda folder=folder: read_mounted(folder), folder)
        except DamagedError as error:
            skipped.append(f"{folder.name} in the mirror is not whole: {error}")
            continue
        # Written as a run's own checkpoints are, so that a kill leaves all of it or nothing.
        commit_folder(local / folder.name, files)
        return step_of(folder.name), skipped
    if skipped:
        raise MirrorError(
            f"no checkpoint in {mirrored} is whole ({'; '.join(skipped)}); if they were written moments ago, "
            f"wait and run the same command again; to start anew, rename {mirrored.parent} or "
            "unset mirror_dir"
        )
    return None, []


def _restore_cache(mirrored: Path, cache_folder: Path) -> tuple[int, list[str]]:
    """How many packs came, and what was left out: its records are encoded anew."""
    cache_folder.mkdir(parents=True, exist_ok=True)
    packs = 0
    left_out = []
    for name in sorted(_patiently(lambda: packs_in(mirrored), mirrored) - packs_in(cache_folder)):
        try:
            _when_visible(
                lambda name=name: _bring_pack(mirrored / name, cache_folder / name), mirrored / name
            )
            packs += 1
        except DamagedError as error:
            left_out.append(f"{name} in the mirror is left out, and its records are encoded anew: {error}")
    # The index last, and only over none: it names records, which must be there first.
    if INDEX_NAME in _names(mirrored) and not (cache_folder / INDEX_NAME).exists():
        index = _patiently((mirrored / INDEX_NAME).read_bytes, mirrored / INDEX_NAME)
        write_atomically(cache_folder / INDEX_NAME, index)
        try:
            read_index(cache_folder)
        except IndexFileError:
            (cache_folder / INDEX_NAME).unlink()  # the next precompute writes it
    return packs, left_out


def _bring_pack(source: Path, target: Path) -> None:
    with staged(target) as partial:
        try:
            shutil.copyfile(source, partial)
            pack = Pack(partial)
            damaged = sum(not pack.is_sound(row) for row in range(len(pack)))
        except FileNotFoundError as error:
            raise DamagedError("it is missing") from error
        except PackError as error:
            raise DamagedError("it is cut short or damaged") from error
        if damaged:
            raise DamagedError(f"{damaged} of {len(pack)} records are damaged")
        replace(partial, target)


def _names(folder: Path) -> list[str]:
    return _patiently(lambda: os.listdir(folder), folder)


def _when_visible(read: Callable[[], Read], path: Path) -> Read:
    # A copy that was written elsewhere moments ago may become visible file by file.
    for pause_seconds in LATE_SECONDS:
        try:
            return _patiently(read, path)
        except DamagedError:
            time.sleep(pause_seconds)
    return _patiently(read, path)


def _patiently(read: Callable[[], Read], path: Path) -> Read:
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


def restore_if_wanted(config: CheckpointConfig, output_dir: Path, cache_folder: Path) -> None:
    """What the mirror has of a run that goes on, onto a machine that has nothing of it; what came is told.

    Raises:
        MirrorError, OSError: As ``restore``.
    """
    if config.mirror_dir is None or config.resume_from_checkpoint != "latest":
        return
    restored = restore(config.mirror_dir, output_dir, cache_folder)
    if restored is None:
        return
    for problem in restored.skipped:
        LOGGER.warning("%s", problem)
    step = "no checkpoint yet" if restored.step is None else f"the checkpoint of step {restored.step}"
    LOGGER.warning(
        "brought back from the mirror in %s: %s and %d files of the cache",
        config.mirror_dir,
        step,
        restored.packs,
    )
