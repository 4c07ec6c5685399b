"""Stops a trainer at every step, or kills it at any moment, and starts it again: any trainer that can be described.

A trainer is described by a ``Contender``. It works in the current folder, and goes on by itself from what is there.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.faults.operations import silence


@dataclass(frozen=True)
class Result:
    """What a finished run left, as hashes and numbers."""

    weights: str
    states: str
    """Of the last checkpoint's optimiser."""
    records: tuple[Any, ...]
    """Step and loss, in the order of the log."""


class Contender(Protocol):
    """A trainer with all its settings."""

    def steps(self) -> Iterator[int]:
        """Train in the current folder and yield the number of each step; closed, it stops as a user would stop it."""
        ...

    def checkpoints(self) -> list[Path]:
        """Those of the current folder, the newest first: what somebody would delete when it cannot be read."""
        ...

    def result(self) -> Result:
        """Of the run in the current folder."""
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
    assert _ended(_start(contender, folder)) == 0
    return result_in(contender, folder)


def cut_at(
    contender: Contender, folder: Path, cuts: Iterable[int]
) -> tuple[Result, dict[int, Result | None]]:
    """Train straight, and at each of these steps let a copy of the process stop there and be started again.

    Returns:
        The straight run's result, and by cut that of the copy; None where it failed.
    """
    straight, wanted, codes = folder / "straight", set(cuts), {}
    before = Path.cwd()
    straight.mkdir(parents=True)
    os.chdir(straight)
    try:
        running = contender.steps()
        for step in running:
            if step in wanted:
                codes[step] = _ended(
                    _fork(lambda step=step: _stop_and_go_on(contender, running, folder / str(step)))
                )
    finally:
        os.chdir(before)
    results = {
        step: None if code else result_in(contender, folder / str(step)) for step, code in codes.items()
    }
    return result_in(contender, straight), results


def run_under_kills(
    contender: Contender, folder: Path, chance: random.Random, longest_seconds: float, most_kills: int = 1000
) -> Kills:
    """Start again and again, killing after a random time, until one start gets through.

    The longest time grows with every kill, so that a machine that has become slow gets through as well.
    """
    found = Kills()

    def wait(child: int) -> int | None:
        longest = longest_seconds * (1 + found.kills / 20)
        return _sleep(child, chance.uniform(0, longest) if found.kills < most_kills else float("inf"))

    _restart(contender, folder, wait, found)
    return found


def run_under_aimed_kills(
    contender: Contender, folder: Path, chance: random.Random, window_seconds: float
) -> Kills:
    """The same, with kills while a checkpoint is being written; about every other checkpoint is let through."""
    found = Kills()
    _restart(contender, folder, lambda child: _sleep_until_save(folder, child, chance, window_seconds), found)
    return found


def result_in(contender: Contender, folder: Path) -> Result:
    """The result of the run in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return contender.result()
    finally:
        os.chdir(before)


def _restart(contender: Contender, folder: Path, wait: Callable[[int], int | None], found: Kills) -> None:
    while True:
        child = _start(contender, folder)
        code = wait(child)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found.kills += 1
        elif code == 0:
            return
        else:
            _help_out(contender, folder, found)


def _help_out(contender: Contender, folder: Path, found: Kills) -> None:
    before = Path.cwd()
    os.chdir(folder)
    try:
        checkpoints = contender.checkpoints()
        assert checkpoints, "it fails from an empty folder too"
        shutil.rmtree(checkpoints[0])
    finally:
        os.chdir(before)
    found.manual_steps += 1
    found.lost += len(checkpoints) == 1


def _sleep(child: int, seconds: float) -> int | None:
    """The exit code of a child that ends before; None of one that still runs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def _sleep_until_save(folder: Path, child: int, chance: random.Random, window_seconds: float) -> int | None:
    watched = _names(folder)
    skipped = chance.randrange(2)
    while (code := _sleep(child, 0.001)) is None:
        names = _names(folder)
        if names - watched and skipped:
            skipped, watched = skipped - 1, names
            if (code := _sleep(child, window_seconds)) is not None:
                return code
            watched = _names(folder)
        elif names - watched:
            return _sleep(child, chance.uniform(0, window_seconds))
        watched &= names
    return code


def _names(folder: Path) -> set[str]:
    """Folders with a number in their name, as checkpoints have, whole or not."""
    names = {
        name for _, inside, _ in os.walk(folder) for name in inside
    }  # walk bears that they vanish meanwhile
    return {name for name in names if set(name) & set("0123456789") and not name.startswith(".deleted")}


def _start(contender: Contender, folder: Path) -> int:
    def work() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        for _ in contender.steps():
            pass

    return _fork(work)


def _stop_and_go_on(contender: Contender, running: Any, folder: Path) -> None:
    shutil.copytree(Path.cwd(), folder)
    os.chdir(folder)
    running.close()
    for _ in contender.steps():
        pass


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            silence()
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
