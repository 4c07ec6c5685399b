"""run.json in a run folder: what makes the weights beside it this run's. Loads no torch.

It is written before the first picture is encoded, so that a changed run is told from the same one in time. A
run that is complete, and whose files are untouched, is answered from it within a moment.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_utils.storage.log import WEIGHTS_NAME
from lora_utils.system.files import file_hash, problem_of, write_atomically

LOGGER = logging.getLogger(__name__)
NOTE_NAME = "run.json"
CHECKPOINTS = "checkpoints"
SCHEMA = 1


@dataclass(frozen=True)
class RunNote:
    """What a run is."""

    fixed: dict[str, Any]
    """What makes it another run when it changes; from ``run_identity``."""
    free: dict[str, Any]
    """What may change while steps are left."""
    base: str
    """Name of the base model, for people."""
    examples: dict[str, list[str]]
    """Source of each example to the digests of its picture and of its captions."""
    inputs: str | None = None
    """What stood for settings and files before the data was read."""
    steps: int | None = None
    """Optimiser updates in all; None until every picture is encoded, and so counted."""
    weights: str | None = None
    """SHA-256 of the LoRA; None until there is one."""
    under_way: dict[str, Any] | None = None
    """The note of a run that goes on from here, until its LoRA takes the place of the one that is here."""

    @property
    def current(self) -> "RunNote":
        """Of what is trained now, or was trained last."""
        return RunNote(**self.under_way) if self.under_way is not None else self


def read_note(folder: Path) -> RunNote | None:
    """The note of a run folder; None where there is none that can be read, the latter with a warning."""
    path = folder / NOTE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if content.pop("schema") != SCHEMA:
            raise ValueError("it is of another version")
        note = RunNote(**content)
        for part in (note.fixed, note.free, note.examples, note.current.fixed, note.current.free):
            if not isinstance(part, dict):
                raise TypeError("it holds something else")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # Every checkpoint says once more what its run is.
        LOGGER.warning("%s cannot be used (%s); the run is judged by its checkpoints", path, error)
        return None
    return note


def write_note(folder: Path, note: RunNote) -> None:
    """Say in a run folder what run it is of; a folder that says so already is left as it is."""
    content = json.dumps({"schema": SCHEMA} | vars(note)).encode()
    path = folder / NOTE_NAME
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def begin_note(folder: Path, note: RunNote) -> None:
    """Say which run begins or goes on; a LoRA that is there stays described until it is replaced."""
    before = read_note(folder)
    has_weights = before is not None and before.weights is not None
    write_note(folder, replace(before, under_way=vars(note)) if before and has_weights else note)


def note_steps(folder: Path, steps: int) -> None:
    """Add how many steps the run under way has in all, once every picture is encoded."""
    note = read_note(folder)
    if note is not None and note.under_way is not None:
        write_note(folder, replace(note, under_way=note.under_way | {"steps": steps}))
    elif note is not None:
        write_note(folder, replace(note, steps=steps))


def note_weights(folder: Path, weights: Path) -> None:
    """Say that the LoRA is now that of the run under way."""
    note = read_note(folder)
    if note is not None:
        write_note(folder, replace(note.current, weights=file_hash(weights)))


def is_whole(folder: Path, note: RunNote) -> bool:
    """Whether the LoRA is the one that the run wrote, and its newest checkpoint is sound."""
    weights = folder / WEIGHTS_NAME
    if note.weights is None or not weights.is_file() or file_hash(weights) != note.weights:
        return False
    newest = newest_checkpoint_in(folder)
    return newest is not None and problem_of(newest) is None


def newest_checkpoint_in(folder: Path) -> Path | None:
    """The newest checkpoint by its name."""
    return max((folder / CHECKPOINTS).glob("step-" + "[0-9]" * 9), default=None)


def numbered(folder: Path) -> Iterator[Path]:
    """The folder, then its name with -2, -3 and so on."""
    yield folder
    number = 2
    while True:
        yield folder.with_name(f"{folder.name}-{number}")
        number += 1


def stamp_files(folders: Iterable[Path]) -> str:
    """What stands for all files below some folders: their names, sizes and times."""
    digest = hashlib.sha256()
    seen: set[tuple[int, int]] = set()
    for folder in folders:
        for path, status in _files(folder.resolve(), seen):
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _files(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below a folder, in order; what runs have written there is no input."""
    # A link may lead back to a folder above.
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen or (folder / NOTE_NAME).is_file():
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(Path(entry.path), seen)
        elif not entry.name.startswith("."):
            yield entry.path, entry.stat(follow_symlinks=entry.is_file())
