"""Reads benchmarks/results/*.json for the page and the picture that ``benchmarks`` makes, and writes tables."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MISSING = "not measured yet"
TECHNIQUES = [  # label, section and name in forecast.json, case of gpu
    ("ours, nothing recomputed", "own", "lean", "ours, nothing recomputed"),
    ("ours, 722 linears", "own", "lean, 722 linears", "ours, 722 linears"),
    ("ours, everything recomputed", "own", "lean, full", "ours, all recomputed"),
    ("ours, int8 base", "own", "lean, int8", "ours, int8"),
    ("ours, nf4 base", "own", "lean, nf4", "ours, nf4"),
    ("ours, nf4 base, 1536 px", "own", "lean, nf4, 1536 px", "ours, nf4, 1536 px"),
    (
        "ours, nf4 base, everything recomputed, 8-bit Adam, rank 8",
        "own",
        "low memory: nf4, full, 8-bit Adam, rank 8",
        "ours, low memory",
    ),
    ("diffusers' example script", "published", "diffusers' script", "example script"),
    (
        "diffusers' example script, nothing recomputed",
        "published",
        "diffusers' script, nothing recomputed",
        "example script, nothing recomputed",
    ),
    ("sd-scripts' way", "published", "sd-scripts", "sd-scripts"),
    ("OneTrainer's way", "published", "OneTrainer", "OneTrainer"),
]


class Results:
    """Result files by name."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.json"))
        self._content = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}

    def figures(self, name: str) -> dict[str, Any]:
        """Empty where nothing was measured."""
        return self._content.get(name, {}).get("figures", {})

    def gpus(self, kind: str = "") -> list[str]:
        """Names of the files of a kind: "", caps_ or micro_; a T4 itself comes first."""
        prefix = f"gpu_{kind}"
        others = () if kind else ("gpu_caps_", "gpu_micro_")
        names = [name for name in self._content if name.startswith(prefix) and not name.startswith(others)]
        return sorted(names, key=lambda name: (name != f"{prefix}t4", name))

    def told(self, name: str) -> str:
        """Machine, date and commit."""
        if name not in self._content:
            return f"{MISSING} (`python -m benchmarks {name}`)"
        found = self._content[name]
        gpu = found.get("gpu")
        where = f"{gpu['name']} (driver {gpu['driver']}, CUDA {gpu['cuda']})" if gpu else found["machine"]
        return f"{where}, {found['date']}, commit {found['commit'] or 'unknown'}"

    def row(self, name: str, section: str, wanted: str) -> dict[str, Any]:
        """The row of a section whose first cell is the wanted one."""
        rows = self.figures(name).get(section, [])
        return next((row for row in rows if next(iter(row.values())) == wanted), {})


def outcome(record: dict[str, Any], key: str, missing: str = MISSING) -> Any:
    """A figure of a case, or why there is none."""
    if record.get("status", "ok") != "ok":
        return record["status"]
    return missing if record.get(key) is None else record[key]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown; a column for every key, in order of appearance; empty without rows."""
    rows = [row for row in rows if row]
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(key.replace('_', ' ') for key in keys)} |", "|---" * len(keys) + "|"]
    return "\n".join(lines + [f"| {' | '.join(_cell(row.get(key)) for key in keys)} |" for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    )
