"""Brings a run back from the mirror onto a machine that has nothing of it.

Copies that are damaged are named and left where they are. What cannot be read is never taken for absent: a
run that silently starts anew has lost what the mirror is for.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

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
    patiently,
    read_mounted,
    steps_in,
    when_visible,
)
from lora_utils.storage.mirror_note import Identity, existing, read_standing, why_other
from lora_utils.system.files import DamagedError, commit_folder, staged, write_atomically
from lora_utils.system.portable import replace

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """What came back from the mirror."""

    step: int | None
    """Of the checkpoint; None where the mirror had none yet."""
    packs: int
    """Of the cache."""
    skipped: tuple[str, ...]
    """A sentence for each folder of another run and each copy that was not whole; both are left there."""


def restore(
    mirror_dir: Path,
    output_dir: Path,
    cache_folder: Path,
    identity: Identity | None = None,
    name: str | None = None,
) -> Restored | None:
    """Copy the newest whole checkpoint and the cache of a run from the mirror; None where there is nothing.

    A run folder that has checkpoints is left alone.

    Args:
        mirror_dir: The mirror.
        output_dir: The run folder.
        cache_folder: The run's cache.
        identity: What the run is, from ``run_identity``; without it, whatever has the name is it.
        name: Of the run's folder in the mirror; that of output_dir, when not given.

    Raises:
        MirrorError: The mirror is absent or cannot be read, or none of its checkpoints is whole; says what to
            do.
        OSError: The local disk failed or is full.
    """
    patiently(lambda: open_mirror(mirror_dir), mirror_dir)
    local = output_dir / CHECKPOINTS
    if local.is_dir() and steps_in(local):
        return None
    name = name or output_dir.resolve().name
    mirrored = _find_named(mirror_dir, name) if identity is None else _find(mirror_dir, name, identity)

    packs = 0
    left_out: list[str] = []
    if mirrored.cache is not None:
        packs, left_out = _restore_cache(mirrored.cache, cache_folder)
    # The checkpoint comes last: killed on the way, a run folder that still lacks it is restored anew.
    step = None
    skipped: list[str] = []
    if mirrored.checkpoints is not None:
        step, skipped = _restore_checkpoint(mirrored.checkpoints, local)
    if step is None and not packs and not left_out and not mirrored.passed:
        return None
    return Restored(step, packs, (*mirrored.passed, *skipped, *left_out))


@dataclass(frozen=True)
class _Mirrored:
    """What the mirror has of a run."""

    checkpoints: Path | None = None
    cache: Path | None = None
    passed: tuple[str, ...] = ()
    """A sentence for each folder of the run's name that is another's."""


def _find_named(mirror_dir: Path, name: str) -> _Mirrored:
    run = mirror_dir / name
    inside = _names(run) if name in _names(mirror_dir) else []
    checkpoints = run / CHECKPOINTS if CHECKPOINTS in inside else None
    return _Mirrored(checkpoints, run / PRECOMPUTED if PRECOMPUTED in inside else None)


def _find(mirror_dir: Path, name: str, identity: Identity) -> _Mirrored:
    """Look into every folder of the name, then with -2, -3 and so on.

    Raises:
        MirrorError: They cannot be read; or none is this run's, and one may be.
    """
    ours: list[_Mirrored] = []
    unknown: list[Path] = []
    caches: list[Path | None] = []
    passed: list[str] = []
    for folder in existing(mirror_dir, name):
        standing = read_standing(folder)
        if standing.is_of(identity, name, folder):
            ours.append(_find_named(mirror_dir, folder.name))
            continue
        taken = "nothing is"
        if standing.fixed is None and standing.content == CHECKPOINTS:
            unknown.append(folder)
        # Of equal data and encoders its records are the very ones that are needed, whatever else differs.
        elif standing.fixed is not None and standing.fixed.get("data") == identity["fixed"].get("data", ""):
            caches.append(_find_named(mirror_dir, folder.name).cache)
            taken = "only its cache, of the same data, is"
        passed.append(f"{folder} holds {why_other(standing, identity)}: {taken} taken from it")
    if unknown and not ours:
        raise MirrorError(
            f"no checkpoint in {unknown[0]} is whole, so they may be this run's or another's; if they were "
            "written moments ago, wait and run the same command again; to start anew, rename "
            f"{unknown[0]} or unset mirror_dir"
        )
    # Several are this run's where a drive had lost, for a while, what the first one is.
    best = max(ours, key=_newest_step, default=_Mirrored())
    cache = next((folder for folder in (best.cache, *caches) if folder is not None), None)
    return _Mirrored(best.checkpoints, cache, tuple(passed))


def _newest_step(mirrored: _Mirrored) -> int:
    checkpoints = mirrored.checkpoints
    if checkpoints is None:
        return -1
    folders = patiently(lambda: steps_in(checkpoints), checkpoints)
    return max((step_of(folder.name) or 0 for folder in folders), default=-1)


def _restore_checkpoint(mirrored: Path, local: Path) -> tuple[int | None, list[str]]:
    skipped = []
    for folder in patiently(lambda: steps_in(mirrored), mirrored):
        try:
            files = when_visible(lambda folder=folder: read_mounted(folder), folder)
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
    for name in sorted(patiently(lambda: packs_in(mirrored), mirrored) - packs_in(cache_folder)):
        try:
            when_visible(lambda name=name: _bring_pack(mirrored / name, cache_folder / name), mirrored / name)
            packs += 1
        except DamagedError as error:
            left_out.append(f"{name} in the mirror is left out, and its records are encoded anew: {error}")
    # The index last, and only over none: it names records, which must be there first.
    if INDEX_NAME in _names(mirrored) and not (cache_folder / INDEX_NAME).exists():
        index = patiently((mirrored / INDEX_NAME).read_bytes, mirrored / INDEX_NAME)
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
    return patiently(lambda: os.listdir(folder), folder)


def restore_if_wanted(
    config: CheckpointConfig,
    output_dir: Path,
    cache_folder: Path,
    identity: Identity | None = None,
    name: str | None = None,
) -> None:
    """What the mirror has of a run that goes on, onto a machine that has nothing of it; what came is told.

    Args:
        config: Whether there is a mirror, and whether the run goes on.
        output_dir: As ``restore``, and all that follows.
        cache_folder: The run's cache.
        identity: What the run is.
        name: Of the run's folder in the mirror.

    Raises:
        MirrorError, OSError: As ``restore``.
    """
    if config.mirror_dir is None or config.resume_from_checkpoint != "latest":
        return
    restored = restore(config.mirror_dir, output_dir, cache_folder, identity, name)
    if restored is None:
        return
    for problem in restored.skipped:
        LOGGER.warning("%s", problem)
    if restored.step is None and not restored.packs:
        return
    step = "no checkpoint yet" if restored.step is None else f"the checkpoint of step {restored.step}"
    LOGGER.warning(
        "brought back from the mirror in %s: %s and %d files of the cache",
        config.mirror_dir,
        step,
        restored.packs,
    )
