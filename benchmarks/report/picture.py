"""Draws docs/benchmarks.png: what a training step takes of a T4, ours and others' ways."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report.tables import TECHNIQUES, Results, record_of
from lora_utils.memory.cards import T4

OURS = "#2a6f97"
OTHERS = "#8d99a6"
LIMIT = "#c1121f"


def draw(results: Results, path: Path) -> None:
    """Bars of what torch reserves by forecast, against what it can; dots where a GPU was measured."""
    names = results.gpus()
    records = results.figures(names[0])["records"] if names else {}
    rows = []
    for label, section, name, case in reversed(TECHNIQUES):  # matplotlib counts from below
        forecast = results.row("forecast", section, name)
        if forecast:
            rows.append((label, forecast, record_of(records, case)))

    figure = Figure(figsize=(8, 1.2 + 0.4 * max(1, len(rows))), layout="constrained")
    axis = figure.subplots()
    beside = axis.get_yaxis_transform()  # x in widths of the axes: times stand in a column at their right
    for row, (label, forecast, record) in enumerate(rows):
        reserved = forecast["reserved_gib"]
        axis.barh(row, reserved, color=OURS if label.startswith("ours") else OTHERS, height=0.62)
        failed = ", ran out of memory" if record.get("status") == "out of memory" else ""
        axis.text(0.15, row, f"{reserved:.1f}{failed}", va="center", color="white", fontsize=9)
        seconds = forecast["t4_roofline_ms"] / 1000
        axis.text(1.02, row, f"{seconds:.2f} s", va="center", transform=beside, fontsize=9)
        if record.get("status") == "ok":
            axis.plot(record["reserved_gib"], row, "o", color="black", markeredgecolor="white", markersize=6)

    axis.axvline(T4.usable_gib, color=LIMIT, linewidth=1.2)
    axis.text(
        T4.usable_gib, len(rows) - 0.4, f"a T4: {T4.usable_gib:g} ", color=LIMIT, ha="right", fontsize=9
    )
    axis.text(1.02, len(rows) - 0.4, "a T4's step,\nby roofline", transform=beside, fontsize=9)

    axis.set_yticks(range(len(rows)), [textwrap.fill(label, 34) for label, *_ in rows], fontsize=9)
    dots = f"\ndots: measured on {results.told(names[0])}" if names else "\nnot measured yet on a GPU"
    figure.supxlabel(
        f"GiB that torch reserves for one training step of SDXL, 1024 px, batch 1: forecast{dots}", fontsize=9
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, max([16, *(forecast["reserved_gib"] for _, forecast, _ in rows)]))
    figure.savefig(path, dpi=120, metadata={"Software": None})  # else a new matplotlib makes new bytes
