"""The run folder: config.yaml, versions.json, metrics.jsonl, summary.json."""

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_utils import __version__
from lora_utils.files import write_atomically

PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "pydantic",
    "numpy", "pillow", "ipywidgets", "papermill",
)  # fmt: skip


METRICS = "metrics.jsonl"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python, this package and the given ones; a package that is absent says so."""
    found = {"python": platform.python_version(), "lora_utils": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run folder; empty where there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class RunLog:
    """Writes a run's records; a context manager, so that the summary says how the run ended."""

    def __init__(self, folder: Path, resolved_config: str, metrics: bytes = b"") -> None:
        """Start the records; metrics.jsonl begins with what a checkpoint has of it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        write_atomically(folder / "config.yaml", resolved_config.encode())
        write_atomically(folder / "versions.json", json.dumps(versions(), indent=1).encode())
        write_atomically(folder / METRICS, metrics)
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        self.is_paused = False
        """The run stopped by itself before its end, and can go on."""
        self._summary: dict[str, Any] = {"status": "running"}
        self._write_summary()

    def add(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a chart can read it while the run goes on."""
        lost = {name: None for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
        self._metrics.write(json.dumps(record | lost) + "\n")  # JSON has no NaN
        self._metrics.flush()

    def metrics(self) -> bytes:
        """What metrics.jsonl holds."""
        return (self.folder / METRICS).read_bytes()

    def summarise(self, **facts: Any) -> None:
        """Add facts to summary.json."""
        self._summary |= facts
        self._write_summary()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        ended = "paused" if self.is_paused else "done"
        status = ended if kind is None else "interrupted" if kind in (KeyboardInterrupt, GeneratorExit) else "failed"
        self.summarise(status=status, **({"error": str(error)} if status == "failed" else {}))

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
