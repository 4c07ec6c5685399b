"""A disk that fails at one operation of a checkpoint, or from one on."""

import errno
import logging
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.faults.operations import failing, operations
from benchmarks.faults.small_checkpoints import (
    ABOUT,
    assert_next_save_is_clean,
    metrics_at,
    newest_step,
    state_at,
)
from lora_utils.config.training import CheckpointConfig
from lora_utils.storage.store import FOLDER, CheckpointStore

ERRORS = (errno.ENOSPC, errno.EIO, errno.ENOTCONN, errno.ESTALE)


class StandIn:
    """What a keeper asks of a trainer."""

    run = SimpleNamespace(steps=100)

    def __init__(self, step: int) -> None:
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return state_at(self.step)


@dataclass(frozen=True)
class Error:
    """What happens in one save."""

    number: int
    code: int
    is_lasting: bool


def keeper_of(output_dir: Path) -> CheckpointStore:
    """One that has made checkpoints of steps 1 and 2."""
    keeper = CheckpointStore(CheckpointConfig(), output_dir, ABOUT["fingerprint"], None)
    for step in (1, 2):
        save(keeper, step)
    return keeper


def save(keeper: CheckpointStore, step: int) -> None:
    """As the course does after a step."""
    about = {name: value for name, value in ABOUT.items() if name != "fingerprint"}
    keeper.save(StandIn(step), about, metrics_at(step))  # pyright: ignore[reportArgumentType]


def errors(folder: Path, codes: tuple[int, ...]) -> list[Error]:
    """Every operation of a save, reads too, with each of these errors, once and from then on."""
    keeper = keeper_of(folder)
    found = operations(keeper.folder, lambda: save(keeper, 3), reads=True)
    return [Error(*one) for one in product(range(len(found)), codes, (False, True))]


def survive(folder: Path, error: Error, heard: Callable[[], list[str]]) -> str:
    """Let one save fail; says how it went, after asserting that nothing was lost and that the next save works."""
    shutil.rmtree(folder, ignore_errors=True)
    keeper = keeper_of(folder)
    heard()
    with failing(keeper.folder, error.number, error.code, error.is_lasting) as failed:
        save(keeper, 3)
    assert failed
    said, newest = heard(), newest_step(folder / FOLDER)
    assert len(said) <= 1, said
    paused = bool(said) and "no checkpoint of step 3 (" in said[0] and "training goes on" in said[0]
    pruning_failed = bool(said) and "step 3 is saved, but older checkpoints could not be deleted" in said[0]
    assert paused or (newest == 3 and (pruning_failed or not said)), said
    save(keeper, 4)
    assert [*heard()] == (["checkpoints are made again, from step 4 on"] if paused else [])
    assert newest_step(folder / FOLDER) == 4
    assert_next_save_is_clean(folder / FOLDER, 5)
    return f"{'told' if said else 'tolerated'}, newest {newest}"


def survive_all(folder: Path, codes: tuple[int, ...], heard: Callable[[], list[str]]) -> Counter[str]:
    """How it went, for all errors."""
    found = errors(folder / "counted", codes)
    assert found
    return Counter(survive(folder / "failing", one, heard) for one in found)


class Ear(logging.Handler):
    """Keeps what the package says; called, it gives what came since."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())

    def __call__(self) -> list[str]:
        said, self._said = self._said, []
        return said


@contextmanager
def listening() -> Iterator[Ear]:
    """For as long as it is entered."""
    ear, logger = Ear(), logging.getLogger("lora_utils")
    logger.addHandler(ear)
    try:
        yield ear
    finally:
        logger.removeHandler(ear)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own, in memory.

    Raises:
        PermissionError: Only root may mount one, and not everywhere.
    """
    folder.mkdir(parents=True)
    size = f"size={mebibytes}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise PermissionError(mounted.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(folder: Path, spare_bytes: int) -> Path:
    """Take all the space but this."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - spare_bytes))
    return filler
