"""A disk that fails at one operation of a checkpoint, or from one on: nothing is lost, training goes on."""

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
    """What a store of checkpoints asks of a trainer to save it."""

    steps = 100

    def __init__(self, step: int) -> None:
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return state_at(self.step)


@dataclass(frozen=True)
class Error:
    """What happens in one save."""

    number: int
    """Of the operation that fails, from 0 on."""
    code: int
    """Of ``errno``."""
    is_lasting: bool
    """Whether all operations after it fail too."""


def store_in(output_dir: Path) -> CheckpointStore:
    """One that has made checkpoints of steps 1 and 2."""
    store = CheckpointStore(CheckpointConfig(), output_dir, ABOUT["fingerprint"], None)
    for step in (1, 2):
        save(store, step)
    return store


def save(store: CheckpointStore, step: int) -> None:
    """As training does after a step."""
    about = {name: value for name, value in ABOUT.items() if name != "fingerprint"}  # which the store adds
    store.save(StandIn(step), about, metrics_at(step))  # pyright: ignore[reportArgumentType]


def errors(folder: Path, codes: tuple[int, ...]) -> list[Error]:
    """Every operation of a save, reads too, with each of these errors, once and from then on."""
    store = store_in(folder)
    done = operations(store.folder, lambda: save(store, 3), reads=True)
    return [
        Error(number, code, is_lasting)
        for number, code, is_lasting in product(range(len(done)), codes, (False, True))
    ]


def survive(folder: Path, error: Error, heard: Callable[[], list[str]]) -> str:
    """Let one save fail; says how it went, once nothing was lost and the next save works."""
    shutil.rmtree(folder, ignore_errors=True)
    store = store_in(folder)
    heard()
    with failing(store.folder, error.number, error.code, error.is_lasting) as failed:
        save(store, 3)  # an error that it raised would end training
    assert failed

    # The old or the new is there, and the user is told of what is missing, once.
    said = heard()
    newest = newest_step(folder / FOLDER)
    assert len(said) <= 1, said
    paused = bool(said) and "no checkpoint of step 3 (" in said[0] and "training goes on" in said[0]
    pruning_failed = bool(said) and "step 3 is saved, but older checkpoints could not be deleted" in said[0]
    assert paused or (newest == 3 and (pruning_failed or not said)), said

    # The disk is well again: the next save works, says so where there was a gap, and cleans up.
    save(store, 4)
    assert [*heard()] == (["checkpoints are made again, from step 4 on"] if paused else [])
    assert newest_step(folder / FOLDER) == 4
    assert_next_save_is_clean(folder / FOLDER, 5)
    return f"{'told' if said else 'tolerated'}, newest {newest}"


def survive_all(folder: Path, codes: tuple[int, ...], heard: Callable[[], list[str]]) -> Counter[str]:
    """How it went, for all errors."""
    faults = errors(folder / "counted", codes)
    assert faults
    return Counter(survive(folder / "failing", error, heard) for error in faults)


class Ear(logging.Handler):
    """Keeps what the package says; called, it gives what came since."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())

    def __call__(self) -> list[str]:
        said = self._said
        self._said = []
        return said


@contextmanager
def listening() -> Iterator[Ear]:
    """For as long as it is entered."""
    ear = Ear()
    logger = logging.getLogger("lora_utils")
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
        # Lazy: a file of the test that is still open would refuse it.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(folder: Path, spare_bytes: int) -> Path:
    """Take all the space but this."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - spare_bytes))
    return filler
