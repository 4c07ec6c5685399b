"""The records so far, on disk after each: where a call is cut off, nothing that was measured is lost."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import record as results
from benchmarks.gpu import bars

Records = dict[str, dict[str, Any]]


def file_name(program: str, gpu: dict[str, Any] | None, emulate: str | None) -> str:
    """Of the result file: gpu_t4, gpu_smoke_h200_sm75.

    Args:
        program: ``smoke_``, ``micro_``, ``caps_``, or empty for steps and stages.
        gpu: Facts of the card; None in a rehearsal.
        emulate: Whose kernels were chosen.
    """
    name = re.sub(r"nvidia|tesla|geforce", "", gpu["name"].lower()) if gpu else "rehearsal"
    return f"gpu_{program}{'-'.join(name.split())}" + (f"_{emulate}" if emulate else "")


class Book:
    """Records by name, beside those of earlier calls on the same card."""

    def __init__(
        self,
        name: str,
        folder: Path | None,
        gpu: dict[str, Any] | None,
        commit: str,
        settings: dict[str, Any],
        has_bars: bool,
    ) -> None:
        """Read what is there.

        Args:
            name: From ``file_name``.
            folder: Where the file is; None keeps nothing.
            gpu: Facts of the card.
            commit: Of this code.
            settings: What all records have in common.
            has_bars: Whether the records are of steps and stages, which have bars to pass.
        """
        self.name = name
        self.folder = folder
        self._gpu = gpu
        self._commit = commit
        self._settings = settings
        self._has_bars = has_bars
        earlier = results.read(name, folder) if folder else None
        self.records: Records = earlier["figures"]["records"] if earlier else {}
        self.failed: list[str] = []
        """Names of this call's that failed or took too long."""

    @property
    def path(self) -> Path | None:
        """Of the file."""
        return self.folder / f"{self.name}.json" if self.folder else None

    def holds(self, name: str) -> bool:
        """Whether an earlier call has it, from this commit; or both are of none that git can tell."""
        record = self.records.get(name, {})
        return record.get("status") == "ok" and record.get("commit") == self._commit

    def add(self, name: str, record: dict[str, Any], news: dict[str, Any] | None = None) -> None:
        """Keep, and print.

        Args:
            name: Of the record.
            record: With its status.
            news: What of it is printed; all, if not given.
        """
        self.records[name] = record | {"date": datetime.now(UTC).date().isoformat(), "commit": self._commit}
        self.write()
        if record["status"] in ("failed", "timed out"):
            self.failed.append(name)
        print(f"{name}: {line_of(news or record)}", flush=True)

    def write(self) -> None:
        """Put all records on disk."""
        if self.folder:
            figures: dict[str, Any] = {"settings": self._settings, "bars": self.bars()}
            figures["records"] = self.records
            results.write(self.name, figures, self._gpu, self._commit, self.folder)

    def bars(self) -> list[dict[str, Any]]:
        """What the figures have to show."""
        return bars.bars(self.records) if self._has_bars else []


def line_of(record: dict[str, Any]) -> str:
    """The figures of a record, in a line."""
    hidden = ("status", "job")
    shown = {name: value for name, value in record.items() if name not in hidden}
    expected = shown.pop("forecast", {}).get("allocated_gib")
    parts = [f"{name} {_text(value)}" for name, value in shown.items()]
    return ", ".join([record["status"], *parts, *([f"forecast {expected:.4g} GiB"] if expected else [])])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_text(each)}" for name, each in value.items()) + ")"
    return str(value)
