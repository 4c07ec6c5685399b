"""Which folder a run goes into, and which run a folder holds.

A run is what its settings and data say it is. The same run goes on in its folder; a changed one goes on where
that is sound, such as another rate while steps are left. Everything else is another run: without an
output_dir it gets a folder of its own beside the first, with one it is refused, and that before anything is
encoded. What stands beside weights always describes them.
"""

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_utils.config.schema import PathsConfig
from lora_utils.config.training import CheckpointConfig
from lora_utils.storage.checkpoint import CheckpointError
from lora_utils.storage.identity import changes, data_changes
from lora_utils.storage.log import CONFIG, METRICS, PICTURES, SUMMARY, WEIGHTS_NAME
from lora_utils.storage.run_note import (
    CHECKPOINTS,
    NOTE_NAME,
    RunNote,
    is_whole,
    newest_checkpoint_in,
    numbered,
    read_note,
)
from lora_utils.system.ownership import InUseError
from lora_utils.system.portable import rename

LOGGER = logging.getLogger(__name__)
RUN_FILES = (
    WEIGHTS_NAME, CHECKPOINTS, METRICS, SUMMARY, CONFIG,
    "versions.json", "data_report.csv", PICTURES, NOTE_NAME,
)  # fmt: skip
"""All that a run writes into its folder but the cache, the weights first: without them it holds no run."""
MADE_OF_WEIGHTS = (WEIGHTS_NAME, SUMMARY, CONFIG, PICTURES)
"""Of these, what says something of the weights alone."""
NOT_LEARNED = ("steps", "device", "versions")
"""Of what may change, what leaves finished weights what they are."""
FORCEABLE = {"data", "seed", "train_batch_size", "gradient_accumulation_steps", "processes", "precision"}
"""Of what makes another run, what resume_force can take over."""


class RunFolderError(CheckpointError):
    """A folder holds another run, or none."""


@dataclass(frozen=True)
class RunPlace:
    """Where a run goes."""

    folder: Path
    is_complete: bool = False
    """It is there already, with all its steps."""


@dataclass(frozen=True)
class _Contents:
    """What a folder holds of a run."""

    note: RunNote | None
    step: int
    """Of the newest checkpoint, by its name; 0 where there is none."""
    has_weights: bool

    @property
    def is_empty(self) -> bool:
        return not self.step and not self.has_weights


def choose_folder(
    paths: PathsConfig,
    checkpoint: CheckpointConfig,
    note: RunNote,
    steps: int,
    claim: Callable[[Path], object] = lambda folder: None,
) -> RunPlace:
    """Find the folder that a run goes on in, or a new one; an earlier run is set aside where that is asked.

    Args:
        paths: Whether a folder was given.
        checkpoint: Whether to go on, and whether by force.
        note: What the run is.
        steps: Its optimiser updates in all.
        claim: Called with the folder before anything in it is changed; raises where it is in use.

    Raises:
        RunFolderError: output_dir was given, and holds another run; says what differs, and both ways out.
    """
    starts_anew = checkpoint.resume_from_checkpoint == "none"
    for folder in numbered(paths.run_folder):
        if _judge(folder, paths, checkpoint, note, steps) is None:
            continue
        try:
            claim(folder)
        except InUseError:
            before = read_note(folder)
            is_other = starts_anew or (before is not None and before.fixed != note.fixed)
            if paths.output_dir is not None or not is_other:
                raise
            LOGGER.warning("%s is being written by another run", folder)
            continue
        # Once more: an earlier call of this process may have been ended by the claim, and left a checkpoint.
        place = _judge(folder, paths, checkpoint, note, steps)
        if place is None:
            continue
        if starts_anew and not _look_into(folder).is_empty:
            set_aside_run(folder)
        return place
    raise AssertionError("numbers do not end")


def _judge(
    folder: Path, paths: PathsConfig, checkpoint: CheckpointConfig, note: RunNote, steps: int
) -> RunPlace | None:
    """Whether a run can go into a folder; None where it holds another run, and the next is to be tried.

    Raises:
        RunFolderError: It holds another run, and was given.
    """
    contents = _look_into(folder)
    is_given = paths.output_dir is not None
    if contents.is_empty:
        return RunPlace(folder)
    if checkpoint.resume_from_checkpoint == "none":
        return RunPlace(folder) if is_given else None
    objections = _objections(contents, note, steps, checkpoint)
    if not objections:
        is_complete = _has_all_steps(contents, checkpoint, note, steps)
        return RunPlace(folder, is_complete and is_whole(folder, contents.note or note))
    if is_given:
        raise RunFolderError(_refusal(folder, objections, contents, note, steps))
    LOGGER.warning("%s holds another run: %s", folder, "; ".join(objections))
    return None


def require_same_data(paths: PathsConfig, checkpoint: CheckpointConfig, note: RunNote) -> None:
    """Refuse to encode other pictures for a run folder that was given, before it takes an hour.

    Raises:
        RunFolderError: As ``choose_folder``.
    """
    if paths.output_dir is None or checkpoint.resume_from_checkpoint == "none" or checkpoint.resume_force:
        return
    contents = _look_into(paths.output_dir)
    before = contents.note
    if contents.is_empty or before is None or before.fixed.get("data") == note.fixed["data"]:
        return
    objections = [data_changes(before.examples, note.examples)]
    raise RunFolderError(_refusal(paths.output_dir, objections, contents, note, 0))


def set_aside_run(folder: Path, names: Sequence[str] = RUN_FILES) -> Path:
    """Move a run's files into ``earlier-1`` (or -2, -3) in its folder: a run folder of its own.

    Args:
        folder: The run folder.
        names: Of its files, those that are moved.
    """
    candidates = (folder / f"earlier-{number}" for number in itertools.count(1))
    aside = next(path for path in candidates if not path.exists())
    aside.mkdir()
    for name in names:
        if (folder / name).exists():
            rename(folder / name, aside / name)
    LOGGER.warning("the earlier run in %s is in %s now; delete it when it is not needed", folder, aside)
    return aside


def _look_into(folder: Path) -> _Contents:
    newest = newest_checkpoint_in(folder)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    note = read_note(folder)
    if note is None and newest:
        note = _note_of_checkpoint(newest)
    return _Contents(note, step, (folder / WEIGHTS_NAME).is_file())


def _note_of_checkpoint(checkpoint: Path) -> RunNote | None:
    """What a checkpoint says of its run: earlier versions wrote no note."""
    try:
        saved = json.loads((checkpoint / "state.json").read_bytes())["about"]["fingerprint"]
        # Of pictures that could be decoded alone, and of the optimiser that was found: judged later.
        fixed = {name: value for name, value in saved["fixed"].items() if name not in ("data", "optimizer")}
        return RunNote(fixed, dict(saved["free"]), "", {})
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None  # damaged: whoever reads the checkpoint says so


def _objections(contents: _Contents, note: RunNote, steps: int, checkpoint: CheckpointConfig) -> list[str]:
    """Why a folder's run cannot go on as this one; empty where it can."""
    before = contents.note
    if before is None:
        # Weights without a run came from elsewhere; checkpoints without a readable one say why themselves.
        return [] if contents.step else ["its LoRA is of no run that is known"]
    names_checkpoint = checkpoint.resume_from_checkpoint != "latest"
    is_left = names_checkpoint or contents.step < _total(before, note, steps)

    now = {name: value for name, value in note.fixed.items() if name in before.fixed}
    differences = _differences(before, note, now)
    if differences and not (checkpoint.resume_force and is_left):
        return differences
    if is_left:
        return []
    # Nothing is left to train: what would be learned otherwise has to be learned anew.
    changed = changes(_learned(before.free), _learned(note.free))
    if changed:
        return changed
    planned = before.free.get("steps")
    if planned in (None, note.free["steps"]):
        return []
    return [f"it has {contents.step} of {planned} steps behind it, and {steps} in all are asked for"]


def _differences(before: RunNote, note: RunNote, now: Mapping[str, Any]) -> list[str]:
    told = []
    for name in sorted(now):
        if before.fixed[name] == now[name]:
            continue
        if name == "data":
            told.append(data_changes(before.examples, note.examples))
        elif name == "base" and before.base not in ("", note.base):
            told.append(f"base is other now: it was {before.base}, and is {note.base}")
        else:
            told += changes({name: before.fixed[name]}, {name: now[name]})
    return told


def _learned(free: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in free.items() if name not in NOT_LEARNED}


def _total(before: RunNote, note: RunNote, steps: int) -> int:
    """Steps in all. Pictures that turn out to be damaged make fewer of the same epochs, which is noted."""
    is_same_plan = before.steps is not None and before.free.get("steps") == note.free["steps"]
    return before.steps if is_same_plan and before.steps else steps


def _has_all_steps(contents: _Contents, checkpoint: CheckpointConfig, note: RunNote, steps: int) -> bool:
    is_latest = checkpoint.resume_from_checkpoint == "latest"
    total = _total(contents.note, note, steps) if contents.note else steps
    return is_latest and contents.step >= total


def _refusal(folder: Path, objections: list[str], contents: _Contents, note: RunNote, steps: int) -> str:
    beside = next(path for path in numbered(folder) if _look_into(path).is_empty)
    before = contents.note
    changed = {name for name, value in note.fixed.items() if before and before.fixed.get(name) != value}
    ways = [
        f"choose a new output_dir such as {beside}",
        "set resume_from_checkpoint=none to start anew here (the earlier run is set aside)",
    ]
    # Offered only where it works.
    if changed and changed <= FORCEABLE and contents.step < steps:
        ways.append("set resume_force=true to go on with what fits")
    listed = ", ".join(ways[:-1]) + f", or {ways[-1]}"
    return f"{folder} holds another run: {'; '.join(objections)}. Nothing was changed; {listed}"
