"""Draws docs/benchmarks.png: what a training step takes of a T4, ours and others' ways."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report.tables import TECHNIQUES, Results
from lora_utils.memory.cards import T4

OURS, OTHERS, LIMIT = "#2a6f97", "#8d99a6", "#c1121f"


def draw(results: Results, path: Path) -> None:
    """Bars of what torch reserves, by forecast, against what it can reserve; dots where a GPU was measured."""
    names = results.gpus()
    records = results.figures(names[0])["records"] if names else {}
    rows = [
        (label, results.row("forecast", section, name), records.get(case, {}))
        for label, section, name, case in reversed(TECHNIQUES)
    ]
    rows = [row for row in rows if row[1]]
    figure = Figure(figsize=(8, 1.2 + 0.4 * max(1, len(rows))), layout="constrained")
    axis = figure.subplots()
    beside = axis.get_yaxis_transform()
    for place, (label, forecast, record) in enumerate(rows):
        reserved = forecast["reserved_gib"]
        axis.barh(place, reserved, color=OURS if label.startswith("ours") else OTHERS, height=0.62)
        axis.text(0.15, place, f"{reserved:.1f}", va="center", color="white", fontsize=9)
        axis.text(
            1.02,
            place,
            f"{forecast['t4_roofline_ms'] / 1000:.2f} s",
            va="center",
            transform=beside,
            fontsize=9,
        )
        if record.get("status") == "ok":
            axis.plot(record["reserved_gib"], place, "o", color="black", markersize=5)
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
    axis.set_xlim(0, 16)
    figure.savefig(path, dpi=120, metadata={"Software": None})
