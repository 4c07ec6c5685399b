"""The run folder: config.yaml, versions.json, metrics.jsonl, summary.json."""

import json
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


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python, this package and the given ones; a package that is absent says so."""
    found = {"python": platform.python_version(), "lora_utils": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class RunLog:
    """Writes a run's records; a context manager, so that the summary says how the run ended."""

    def __init__(self, folder: Path, resolved_config: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        write_atomically(folder / "config.yaml", resolved_config.encode())
        write_atomically(folder / "versions.json", json.dumps(versions(), indent=1).encode())
        self._metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._summary: dict[str, Any] = {"status": "running"}
        self._write_summary()

    def add(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a chart can read it while the run goes on."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

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
        status = "done" if kind is None else "interrupted" if kind in (KeyboardInterrupt, GeneratorExit) else "failed"
        self.summarise(status=status, **({"error": str(error)} if status == "failed" else {}))

    def _write_summary(self) -> None:
        write_atomically(self.folder / "summary.json", json.dumps(self._summary, indent=1).encode())


class SilentLog:
    """Stands in for the log in every process but the first."""

    def __init__(self, folder: Path, resolved_config: str) -> None:
        pass

    def add(self, record: dict[str, Any]) -> None:
        pass

    def summarise(self, **facts: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
