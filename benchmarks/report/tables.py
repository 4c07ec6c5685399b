"""Result files by name, and figures as Markdown: what the page and the picture are made from."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MISSING = "not measured yet"
NO_RECOMPUTATION = "nothing is recomputed"  # a plan's own words
TECHNIQUES = [
    ("ours, 771 layers, the default", "own", "default", "ours, 771 layers"),
    ("ours, 771 layers, everything recomputed", "own", "default, full", "ours, 771 layers, all recomputed"),
    ("ours, int8 base", "own", "default, int8", "ours, int8"),
    ("ours, nf4 base", "own", "default, nf4", "ours, nf4"),
    ("ours, nf4 base, 1536 px", "own", "default, nf4, 1536 px", "ours, nf4, 1536 px"),
    (
        "ours, nf4 base, everything recomputed, 8-bit Adam, rank 8",
        "own",
        "default, low memory: nf4, full, 8-bit Adam, rank 8",
        "ours, low memory",
    ),
    ("ours, 722 linears", "own", "lean, 722 linears", "ours, 722 linears"),
    ("ours, attention, nothing recomputed", "own", "lean", "ours, nothing recomputed"),
    ("ours, attention, everything recomputed", "own", "lean, full", "ours, all recomputed"),
    # Without the VAE on both sides: the forecast is of the U-Net alone, and so is this case.
    (
        "diffusers' example script, attention",
        "published",
        "diffusers' script",
        "example script, cached latents",
    ),
    (
        "diffusers' example script, attention, nothing recomputed",
        "published",
        "diffusers' script, nothing recomputed",
        "example script, nothing recomputed",
    ),
    ("sd-scripts' way, 722 linears", "published", "sd-scripts", "sd-scripts"),
    ("OneTrainer's way, 722 linears", "published", "OneTrainer", "OneTrainer"),
]
"""Ways to take a step: label, section and name in forecast.json, name of the case in a GPU's result file."""


class Results:
    """Result files by name, without their suffix; what is not there counts as not measured yet."""

    def __init__(self, folder: Path) -> None:
        """Read all of them."""
        files = sorted(folder.glob("*.json"))
        self._content = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}

    def figures(self, name: str) -> dict[str, Any]:
        """Empty where nothing was measured."""
        return self._content.get(name, {}).get("figures", {})

    def gpus(self, program: str = "") -> list[str]:
        """Names of the files of a GPU program.

        Args:
            program: ``caps_``, ``micro_`` or ``smoke_``; empty for the steps and stages.

        Returns:
            By name of the card, but a T4 itself first: it is the card that all is measured against.
        """
        prefix = f"gpu_{program}"
        others = () if program else ("gpu_caps_", "gpu_micro_", "gpu_smoke_")
        names = [name for name in self._content if name.startswith(prefix) and not name.startswith(others)]
        return sorted(names, key=lambda name: (name != f"{prefix}t4", name))

    def told(self, name: str) -> str:
        """Machine, date and commit."""
        if name not in self._content:
            return f"{MISSING} (`python -m benchmarks {name}`)"
        content = self._content[name]
        gpu = content.get("gpu")
        where = f"{gpu['name']} (driver {gpu['driver']}, CUDA {gpu['cuda']})" if gpu else content["machine"]
        return f"{where}, {content['date']}, commit {content['commit'][:7] or 'unknown'}"

    def row(self, name: str, section: str, wanted: str) -> dict[str, Any]:
        """The row of a section whose first cell is the wanted one; empty where there is none."""
        for row in self.figures(name).get(section, []):
            if next(iter(row.values())) == wanted:
                return row
        return {}


def record_of(records: dict[str, dict[str, Any]], case: str) -> dict[str, Any]:
    """A case's record; empty where it was not run."""
    if case == "ours, nothing recomputed" and case not in records:
        # "ours" recomputes what its plan says: where that is nothing, it is this case.
        ours = records.get("ours", {})
        return ours if ours.get("forecast", {}).get("recomputes") == NO_RECOMPUTATION else {}
    return records.get(case, {})


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
    keys = list(dict.fromkeys(key for row in rows for key in row))  # a set would forget the order
    lines = [f"| {' | '.join(key.replace('_', ' ') for key in keys)} |", "|---" * len(keys) + "|"]
    return "\n".join(lines + [f"| {' | '.join(_cell(row.get(key)) for key in keys)} |" for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, int):
        return f"{value:,}"
    # Three significant digits, but no 1.23e+03.
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
