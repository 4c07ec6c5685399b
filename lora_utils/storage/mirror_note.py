"""Whose a folder of the mirror is: ``run.json`` says which run's, ``owner.json`` which process writes there.

A mount knows no locks, and a machine that was taken away could not release one. So whoever comes last writes
its name there and goes on at once, and whoever finds another name there stops. Folders of earlier versions
have no notes; their checkpoints say which run they are of.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from lora_utils import UserError
from lora_utils.storage.checkpoint import STATE, step_of
from lora_utils.storage.identity import changes
from lora_utils.storage.log import WEIGHTS_NAME
from lora_utils.storage.mirror_copy import forget_pages, write_content
from lora_utils.storage.mirror_folder import (
    CHECKPOINTS,
    discard,
    patiently,
    steps_in,
    when_visible,
)
from lora_utils.storage.run_folder import NOT_LEARNED
from lora_utils.storage.run_note import numbered
from lora_utils.system.files import DamagedError, read_member
from lora_utils.system.ownership import describe, describe_self

LOGGER = logging.getLogger(__name__)
NOTE = "run.json"
OWNER = "owner.json"
SCHEMA = 1
NOTE_BYTES = 2**20


Identity = Mapping[str, Mapping[str, Any]]
"""What makes a run this run: ``fixed`` and ``free`` of ``run_identity``."""


@dataclass(frozen=True)
class Standing:
    """What a folder of the mirror says of itself."""

    fixed: Mapping[str, Any] | None
    """What makes the run in it this run; None where that cannot be told."""
    content: str = ""
    """What nothing may be put beside unless it is ours: checkpoints, a LoRA, a file in the folder's stead."""
    start: str | None = None
    """Which start of the run: two that began at step 0 are two, though all their settings are equal."""
    has_note: bool = False
    name: str | None = None
    """Of the run, whose folder may have a number behind it; None where that cannot be told."""
    step: int = 0
    """Of the newest checkpoint that can be read."""
    free: Mapping[str, Any] = field(default_factory=dict)
    """What it was made with, of what may change on the way."""

    def differences(self, identity: Identity) -> list[str]:
        """What makes it another run than this, as text; empty also where that cannot be told."""
        # A checkpoint knows the class of its optimiser, a run that has not begun the setting.
        unlike = () if self.has_note else ("optimizer",)
        differences = _changes_in_both(self.fixed or {}, identity["fixed"], unlike)
        steps = identity["free"].get("steps")
        if differences or steps is None or self.step < steps:
            return differences
        # Nothing would be left to train: what is to be learned otherwise has to be learned anew.
        differences = _changes_in_both(self.free, identity["free"], NOT_LEARNED)
        if not differences and self.free.get("steps", steps) != steps:
            differences = [f"it has {self.step} steps behind it, and {steps} are asked for"]
        return differences

    def is_of(self, identity: Identity, name: str, folder: Path) -> bool:
        """Whether the folder is that of the run of this name, or nobody's."""
        if self.fixed is None:
            return not self.content
        # What is called like ours with a number may be a run's of that very name, such as of a sweep.
        is_named = folder.name == name or self.name in (None, name)
        return is_named and not self.differences(identity)


def _changes_in_both(saved: Mapping[str, Any], now: Mapping[str, Any], but: Sequence[str]) -> list[str]:
    # What another version did not know of cannot differ.
    names = [name for name in saved if name in now and name not in but]
    # As it comes back from a file: there a tuple is a list.
    as_read = json.loads(json.dumps({name: now[name] for name in names}))
    return changes({name: saved[name] for name in names}, as_read)


class TakenOverError(UserError):
    """Another process writes into the folder now."""


def existing(mirror_dir: Path, name: str) -> Iterator[Path]:
    """The folder of a name, then with -2, -3 and so on, as long as there is one.

    Raises:
        MirrorError: The mirror cannot be read.
    """
    names = patiently(lambda: os.listdir(mirror_dir), mirror_dir)
    return takewhile(lambda folder: folder.name in names, numbered(mirror_dir / name))


def choose_folder(mirror_dir: Path, name: str, identity: Identity) -> Path:
    """The run's folder in the mirror, or the one that it shall have; where others are passed, that is told.

    Raises:
        MirrorError: They cannot be read.
    """
    passed = []
    for folder in existing(mirror_dir, name):
        standing = read_standing(folder)
        if standing.is_of(identity, name, folder):
            break
        passed.append(f"{folder.name} holds {why_other(standing, identity)}")
    chosen = next(islice(numbered(mirror_dir / name), len(passed), None))
    if passed:
        LOGGER.warning("this run is mirrored into %s: %s", chosen, "; ".join(passed))
    return chosen


def why_other(standing: Standing, identity: Identity) -> str:
    """Why a folder is not this run's."""
    if standing.fixed is None:
        return f"{standing.content} of unknown origin"
    return f"another run ({'; '.join(standing.differences(identity)) or f'it is called {standing.name}'})"


def read_standing(folder: Path) -> Standing:
    """What a folder of the mirror says of itself; its note may become visible late.

    Raises:
        MirrorError: It cannot be read.
    """

    def look() -> Standing:
        standing = look_at(folder)
        if standing.fixed is None:
            raise DamagedError(f"{folder} does not say whose it is")
        return standing

    try:
        return when_visible(look, folder)
    except DamagedError:
        return patiently(lambda: look_at(folder), folder)


def look_at(folder: Path) -> Standing:
    """What a folder of the mirror says of itself at this moment.

    Raises:
        OSError: It cannot be read now.
    """
    try:
        names = os.listdir(folder)
    except NotADirectoryError:
        return Standing(None, "a file")
    except FileNotFoundError:
        return Standing(None)
    checkpoints = steps_in(folder / CHECKPOINTS) if CHECKPOINTS in names else []
    content = CHECKPOINTS if checkpoints else "a LoRA" if WEIGHTS_NAME in names else ""
    about = next(
        (about for checkpoint in checkpoints if (about := _about(checkpoint))), Standing(None, content)
    )

    note = _read_json(folder / NOTE)
    if note.get("schema") == SCHEMA and isinstance(note.get("fixed"), dict):
        noted = {name: note.get(name) for name in ("fixed", "start", "name")}
        return replace(about, content=content, has_note=True, **noted)
    return replace(about, content=content)


def write_note(folder: Path, identity: Identity, start: str | None, name: str) -> None:
    """Say whose the folder is; read back when this returns.

    Raises:
        OSError: It could not be written.
    """
    note = {"schema": SCHEMA, "fixed": identity["fixed"], "start": start, "name": name}
    write_content(json.dumps(note, indent=1).encode(), folder / NOTE)


class Owner:
    """The name of this process in a folder of the mirror."""

    def __init__(self) -> None:
        """Write nothing yet."""
        self._note = describe_self() | {"id": uuid.uuid4().hex}

    def take(self, folder: Path) -> None:
        """Become the owner, whoever was; one that did not end by itself is told.

        Raises:
            OSError: It could not be written.
        """
        before = _read_json(folder / OWNER)
        if before and any(before.get(key) != self._note[key] for key in ("pid", "host")):
            LOGGER.warning(
                "%s was mirroring into %s; if it still runs, it stops that", describe(before), folder
            )
        write_content(json.dumps(self._note).encode(), folder / OWNER)

    def require(self, folder: Path) -> None:
        """Make sure that no other process came.

        Raises:
            TakenOverError: One did; names it.
            OSError: That cannot be read now.
        """
        now = _read_json(folder / OWNER)
        if not now:  # lost by the drive
            write_content(json.dumps(self._note).encode(), folder / OWNER)
        elif now.get("id") != self._note["id"]:
            raise TakenOverError(f"{describe(now)} writes there now")

    def give_up(self, folder: Path) -> None:
        """Take the name away at the end, as far as that works."""
        with suppress(OSError):
            if _read_json(folder / OWNER).get("id") == self._note["id"]:
                discard(folder / OWNER)


def _read_json(path: Path) -> dict[str, Any]:
    """What a note says; empty where there is none, or it is damaged."""
    try:
        forget_pages(path)
        with path.open("rb") as file:
            content = json.loads(file.read(NOTE_BYTES))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _about(checkpoint: Path) -> Standing | None:
    """What a checkpoint says of its run; None where it is damaged."""
    try:
        about = json.loads(read_member(checkpoint, STATE))["about"]
        fixed = about["fingerprint"]["fixed"]
        free = about["fingerprint"]["free"]
        if not fixed or not isinstance(fixed, dict) or not isinstance(free, dict):
            return None
        return Standing(fixed, start=about.get("start"), step=step_of(checkpoint.name) or 0, free=free)
    except (DamagedError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
