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
from lora_utils.system.files import sweep, write_atomically
from lora_utils.system.versions import versions

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CONFIG = "config.yaml"
PICTURES = "compare"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # diffusers' own name for it
LOGGER = logging.getLogger(__name__)


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run folder; empty where there is none.

    Raises:
        UserError: It is damaged.
    """
    path = folder / SUMMARY
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

    def __init__(self, folder: Path | None, resolved_config: str, metrics: bytes = b"") -> None:
        """Start the records.

        Args:
            folder: The run folder; None writes nothing, in every process but the first.
            resolved_config: All settings as they are used, YAML.
            metrics: What metrics.jsonl begins with: that of the checkpoint which the run goes on from.
        """
        self.is_paused = False
        """The run stopped by itself before its end, and can go on."""
        self._folder = folder
        self._config = resolved_config.encode()
        self._metrics = bytearray(metrics)
        self._summary: dict[str, Any] = {"status": "running"}
        self._is_behind = False
        if folder is None:
            return

        folder.mkdir(parents=True, exist_ok=True)
        # Beside weights stands what made them, until others take their place.
        if not (folder / WEIGHTS_NAME).exists():
            write_atomically(folder / CONFIG, self._config)
        write_atomically(folder / "versions.json", json.dumps(versions(), indent=1).encode())
        sweep(folder)
        # Lines of steps after the checkpoint go: those steps are taken again.
        write_atomically(folder / METRICS, metrics)
        self._write_summary(folder)

    def add(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a chart can read it while the run goes on.

        Where the disk is full or fails, the lines are kept and written when it is well again.
        """
        finite = {name: None if _is_not_finite(value) else value for name, value in record.items()}
        line = (json.dumps(finite) + "\n").encode()  # JSON has no NaN
        self._metrics += line
        if self._is_behind:
            self._try(self._write_all)
        else:
            self._try(lambda folder: self._append(folder, line))

    def keep_config(self) -> None:
        """Write config.yaml: the weights beside it are of these settings now."""
        self._try(lambda folder: write_atomically(folder / CONFIG, self._config))

    def metrics(self) -> bytes:
        """All lines of metrics.jsonl, those that could not be written too."""
        return bytes(self._metrics)

    def summarise(self, **facts: Any) -> None:
        """Add facts to summary.json; a later one of the same name replaces the earlier."""
        self._summary |= facts
        self._try(self._write_summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error_class is None:
            self.summarise(status="paused" if self.is_paused else "done")
        elif error_class in (KeyboardInterrupt, GeneratorExit):  # a signal; the caller stopped iterating
            self.summarise(status="interrupted")
        else:
            self.summarise(status="failed", error=str(error))

    def _try(self, write: Callable[[Path], None]) -> None:
        """Write into the folder, if there is one; a disk that fails must not end the run."""
        if self._folder is None:
            return
        try:
            write(self._folder)
        except OSError as error:
            if not self._is_behind:
                LOGGER.warning(
                    "the log in %s cannot be written (%s); it is made up for later", self._folder, error
                )
            self._is_behind = True

    def _append(self, folder: Path, line: bytes) -> None:
        with (folder / METRICS).open("ab", buffering=0) as file:
            # Unbuffered, a full disk may take a part of the line without an error.
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write_all(self, folder: Path) -> None:
        write_atomically(folder / METRICS, bytes(self._metrics))
        self._is_behind = False

    def _write_summary(self, folder: Path) -> None:
        write_atomically(folder / SUMMARY, json.dumps(self._summary, indent=1).encode())


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
