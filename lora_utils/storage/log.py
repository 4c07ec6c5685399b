"""The run folder: config.yaml, versions.json, metrics.jsonl, summary.json."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_utils import UserError
from lora_utils.system.files import PARTIAL_SUFFIX, sweep, write_atomically
from lora_utils.system.versions import versions

METRICS = "metrics.jsonl"
LOGGER = logging.getLogger(__name__)


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run folder; empty where there is none.

    Raises:
        UserError: It is damaged.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged; delete it, and run the same again ({type(error).__name__})"
        ) from error


class RunLog:
    """Writes a run's records; a context manager, so that the summary says how the run ended."""

    def __init__(self, folder: Path, resolved_config: str, metrics: bytes = b"") -> None:
        """Start the records; metrics.jsonl begins with what a checkpoint has of it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        write_atomically(folder / "config.yaml", resolved_config.encode())
        write_atomically(folder / "versions.json", json.dumps(versions(), indent=1).encode())
        for stray in folder.glob(f".*{PARTIAL_SUFFIX}"):  # of a process that was killed
            stray.unlink()
        sweep(folder)
        write_atomically(folder / METRICS, metrics)
        self._metrics = bytearray(metrics)
        self._is_behind = False
        self.is_paused = False
        """The run stopped by itself before its end, and can go on."""
        self._summary: dict[str, Any] = {"status": "running"}
        self._write_summary()

    def add(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a chart can read it while the run goes on.

        Where the disk is full or fails, the lines are kept and written when it is well again.
        """
        lost = {
            name: None
            for name, value in record.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
        line = (json.dumps(record | lost) + "\n").encode()  # JSON has no NaN
        self._metrics += line
        self._try(lambda: self._write_all() if self._is_behind else self._append(line))

    def metrics(self) -> bytes:
        """All lines of metrics.jsonl."""
        return bytes(self._metrics)

    def summarise(self, **facts: Any) -> None:
        """Add facts to summary.json."""
        self._summary |= facts
        self._try(self._write_summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = "paused" if self.is_paused else "done"
        status = (
            ended
            if kind is None
            else "interrupted"
            if kind in (KeyboardInterrupt, GeneratorExit)
            else "failed"
        )
        self.summarise(status=status, **({"error": str(error)} if status == "failed" else {}))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._is_behind:
                LOGGER.warning(
                    "the log in %s cannot be written (%s); it is made up for later", self.folder, error
                )
            self._is_behind = True

    def _append(self, line: bytes) -> None:
        with (self.folder / METRICS).open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write_all(self) -> None:
        write_atomically(self.folder / METRICS, bytes(self._metrics))
        self._is_behind = False

    def _write_summary(self) -> None:
        write_atomically(self.folder / "summary.json", json.dumps(self._summary, indent=1).encode())


class SilentLog:
    """Stands in for the log in every process but the first."""

    def __init__(self, folder: Path, resolved_config: str, metrics: bytes = b"") -> None:
        self.is_paused = False

    def add(self, record: dict[str, Any]) -> None:
        pass

    def metrics(self) -> bytes:
        return b""

    def summarise(self, **facts: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
