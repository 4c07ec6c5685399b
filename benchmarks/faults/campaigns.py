"""Stops a trainer at every step, or kills it at any moment, and starts it again.

Any trainer that can be described as a ``Contender``: it works in the current folder, and goes on by itself
from what is there. Every start is forked from this process, which spares it the imports; torch must have one
thread here, since a child that is forked from more hangs. Beside a card every start is a fresh process.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from benchmarks.faults import children


@dataclass(frozen=True)
class Result:
    """What a finished run left, as hashes and numbers: equal for equal runs, bit by bit."""

    weights: str
    """SHA-256 of the weights file."""
    states: str
    """SHA-256 of the last checkpoint's optimiser."""
    records: tuple[Any, ...]
    """Step and loss, in the order of the log."""


class Contender(Protocol):
    """A trainer with all its settings."""

    def steps(self) -> Iterator[int]:
        """Train in the current folder and yield each step's number; closed, stop as for a user."""
        ...

    def checkpoints(self) -> list[Path]:
        """Those of the current folder, the newest first: what a user deletes when it cannot be read."""
        ...

    def result(self) -> Result:
        """What the finished run in the current folder left."""
        ...


@dataclass
class Kills:
    """What happened to one run."""

    kills: int = 0
    manual_steps: int = 0
    """Starts that failed by themselves, until somebody deleted the newest checkpoint."""
    lost: int = 0
    """Of these, how often there was none that could have been kept."""


def run_straight(contender: Contender, folder: Path) -> Result:
    """Train in a child, from start to end."""
    assert children.succeeds(_train, contender, folder)
    return result_in(contender, folder)


def cut_at(
    contender: Contender, folder: Path, cuts: Iterable[int]
) -> tuple[Result, dict[int, Result | None]]:
    """Train straight; and, in a copy of the process or another one, stop after each of these steps and go on.

    Returns:
        The straight run's result, and by cut that of the copy; None where it failed.
    """
    straight = folder / "straight"
    cut = _cut_copies if children.are_forked() else _cut_others
    went_well = cut(contender, straight, set(cuts))
    results = {
        step: result_in(contender, folder / str(step)) if is_well else None
        for step, is_well in went_well.items()
    }
    return result_in(contender, straight), results


def _cut_copies(contender: Contender, straight: Path, cuts: set[int]) -> dict[int, bool]:
    """All cuts share the one run from the start."""
    went_well = {}
    straight.mkdir(parents=True)
    with _working_in(straight):
        running = contender.steps()
        # The generator is at rest in its yield, so a fork here is a run that stands between two steps.
        for step in running:
            if step in cuts:
                copy = straight.with_name(str(step))
                went_well[step] = children.succeeds(_stop_and_go_on, contender, running, copy)
    return went_well


def _cut_others(contender: Contender, straight: Path, cuts: set[int]) -> dict[int, bool]:
    """Each cut is a run of its own, in two processes."""
    assert children.succeeds(_train, contender, straight)
    went_well = {}
    for step in sorted(cuts):
        other = straight.with_name(str(step))
        stops = children.succeeds(_train, contender, other, step)
        went_well[step] = stops and children.succeeds(_train, contender, other)
    return went_well


def run_under_kills(
    contender: Contender, folder: Path, chance: random.Random, longest_seconds: float, most_kills: int = 1000
) -> Kills:
    """Start again and again, killing after a random time, until one start gets through.

    The longest time grows with every kill, so that a machine that has become slow gets through as well.

    Args:
        contender: What is killed.
        folder: Where it runs; made where it is absent.
        chance: Of the times.
        longest_seconds: From a start to its kill, at first.
        most_kills: After so many the run is left alone.
    """
    history = Kills()

    def wait(child: BaseProcess) -> int | None:
        longest = longest_seconds * (1 + history.kills / 20)
        return _sleep(child, chance.uniform(0, longest) if history.kills < most_kills else None)

    _restart(contender, folder, wait, history)
    return history


def run_under_aimed_kills(
    contender: Contender, folder: Path, chance: random.Random, window_seconds: float
) -> Kills:
    """The same, with kills while a checkpoint is being written; about every other checkpoint is let through.

    Args:
        contender: What is killed.
        folder: Where it runs; made where it is absent.
        chance: Of the moments.
        window_seconds: After a checkpoint's folder appears; the kill comes within it.
    """
    history = Kills()

    def wait(child: BaseProcess) -> int | None:
        return _sleep_until_save(folder, child, chance, window_seconds)

    _restart(contender, folder, wait, history)
    return history


def result_in(contender: Contender, folder: Path) -> Result:
    """The result of the run in a folder."""
    with _working_in(folder):
        return contender.result()


def _restart(
    contender: Contender, folder: Path, wait: Callable[[BaseProcess], int | None], history: Kills
) -> None:
    while True:
        child = children.start(_train, contender, folder)
        code = wait(child)
        if code is None:
            children.kill(child)
            history.kills += 1
        elif code == 0:
            return
        else:
            # It failed by itself. Started again it would fail for ever, so somebody has to help.
            _help_out(contender, folder, history)


def _help_out(contender: Contender, folder: Path, history: Kills) -> None:
    """Do what a user does with a run that does not start any more: delete the newest checkpoint."""
    with _working_in(folder):
        checkpoints = contender.checkpoints()
        assert checkpoints, "it fails from an empty folder too"
        shutil.rmtree(checkpoints[0])
    history.manual_steps += 1
    history.lost += len(checkpoints) == 1


def _sleep(child: BaseProcess, seconds: float | None) -> int | None:
    """The exit code of a child that ends before; None of one that still runs."""
    child.join(seconds)
    return child.exitcode


def _sleep_until_save(
    folder: Path, child: BaseProcess, chance: random.Random, window_seconds: float
) -> int | None:
    """Wait until a checkpoint is being written; the exit code, None of a child that is to be killed now."""
    watched = _checkpoint_names(folder)
    skipped = chance.randrange(2)  # without a checkpoint between two kills the run would never get through
    while (code := _sleep(child, 0.001)) is None:
        names = _checkpoint_names(folder)
        if names - watched and skipped:
            skipped -= 1
            # Its name changes when it is committed, which is no second checkpoint.
            if (code := _sleep(child, window_seconds)) is not None:
                return code
            watched = _checkpoint_names(folder)
        elif names - watched:
            return _sleep(child, chance.uniform(0, window_seconds))
        watched &= names
    return code


def _checkpoint_names(folder: Path) -> set[str]:
    """Folders with a number in their name, as checkpoints have, whole or not."""
    # os.walk and not rglob: it bears that folders vanish meanwhile.
    names = {name for _, inside, _ in os.walk(folder) for name in inside}
    # What is about to be deleted has a number, too, and is no checkpoint that is written.
    return {name for name in names if set(name) & set("0123456789") and not name.startswith(".deleted")}


def _train(contender: Contender, folder: Path, last: int | None = None) -> None:
    """In a child: to the end, or until it is stopped after a step."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # of the child alone
    running: Any = contender.steps()
    for step in running:
        if step == last:
            running.close()


def _stop_and_go_on(contender: Contender, running: Any, folder: Path) -> None:
    # The copy works in a copy of the folder: the straight run goes on beside it.
    shutil.copytree(Path.cwd(), folder)
    os.chdir(folder)
    running.close()
    for _ in contender.steps():
        pass


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
