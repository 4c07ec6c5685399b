"""Draws docs/benchmarks.png: what a training step takes of a T4, ours and others' ways."""

from pathlib import Path

from matplotlib.figure import Figure

from lora_utils.cards import T4
from tools.benchmark_results import TECHNIQUES, Results

OURS, OTHERS, TEXT = "#2a6f97", "#b5b5b5", "#333333"


def draw(results: Results, path: Path) -> None:
    """Bars of what torch reserves, by forecast, against what it can reserve; dots where a GPU was measured."""
    names = results.gpus()
    records = results.figures(names[0])["records"] if names else {}
    bars = [
        (label, results.row("forecast", section, name), records.get(case, {}))
        for label, section, name, case in TECHNIQUES
    ]
    bars = [(label, row["reserved_gib"], record.get("reserved_gib")) for label, row, record in bars if row]
    figure = Figure(figsize=(8, 0.8 + 0.36 * max(1, len(bars))), layout="constrained")
    axis = figure.subplots()
    for place, (label, reserved, measured) in enumerate(reversed(bars)):
        axis.barh(place, reserved, color=OURS if label.startswith("ours") else OTHERS, height=0.62)
        axis.text(reserved + 0.15, place, f"{reserved:.1f}", va="center", color=TEXT, fontsize=9)
        if measured:
            axis.plot(measured, place, "o", color="black", markersize=5)
    axis.axvline(T4.usable_gib, color="#c1121f", linewidth=1.2)
    axis.text(T4.usable_gib - 0.1, len(bars) - 0.45, "a T4", color="#c1121f", ha="right", va="bottom", fontsize=9)
    axis.set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)], fontsize=9)
    dots = f"; dots: {results.told(names[0])}" if names else ""
    axis.set_xlabel(f"GiB that torch reserves for one training step, forecast{dots}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, max([T4.usable_gib, *(reserved for _, reserved, _ in bars)]) * 1.1)
    figure.savefig(path, dpi=120, metadata={"Software": None})
