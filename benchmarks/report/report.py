"""Writes docs/benchmarks.md, the measured part of docs/recipes.md and their pictures from results/*.json.

``python -m benchmarks report``. No figure is typed by hand: what no result file holds is "not measured yet".
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from benchmarks.report import recipes
from benchmarks.report.cards import on_gpus
from benchmarks.report.picture import draw
from benchmarks.report.rates import on_rates
from benchmarks.report.smoke import what_holds
from benchmarks.report.tables import MISSING, TECHNIQUES, Results, outcome, record_of, table
from lora_utils.memory.cards import T4

RESULTS = ROOT / "benchmarks" / "results"
OWED = "not measured yet on a T4"
FORECAST = {"allocated_gib": "GiB", "reserved_gib": "reserved", "tflop": "TFLOP", "kernels": "kernels"}
"""Columns of a forecast: key in its result file, header."""


def main() -> None:
    """Write pages and pictures."""
    docs = ROOT / "docs"
    results = Results(RESULTS)
    (docs / "benchmarks.md").write_text(page(), encoding="utf-8")
    draw(results, docs / "benchmarks.png")
    text = (docs / "recipes.md").read_text(encoding="utf-8")
    (docs / "recipes.md").write_text(recipes.renewed(text, results), encoding="utf-8")
    recipes.draw(results, docs / "recipes.png")


def page(folder: Path = RESULTS) -> str:
    """The whole page, as Markdown.

    Args:
        folder: Of result files.
    """
    results = Results(folder)
    paragraphs = [
        "# Benchmarks",
        "Made by `python -m benchmarks report` from `benchmarks/results/`, "
        "where every file says machine, date,\n"
        "commit and versions. A forecast is counted on SDXL's own graph and needs no GPU; "
        "its times are a T4's\nroofline.",
        "![Memory of a training step against a T4's](benchmarks.png)",
        *_techniques(results),
        *on_gpus(results),
        *_under_caps(results),
        *on_rates(results),
        *what_holds(results),
        *_owed(results),
        *_on_cpus(results),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"  # tables may be empty


def _techniques(results: Results) -> list[str]:
    """Forecast and measured, of ours and of others' ways."""
    card = next(iter(results.gpus()), None)
    rows = []
    for label, section, name, case in TECHNIQUES:
        forecast = results.row("forecast", section, name)
        row = {"one step, 1024 px, batch 1, rank 32": label}
        row |= {header: forecast.get(key) for key, header in FORECAST.items()}
        row["T4 by roofline, ms"] = forecast.get("t4_roofline_ms")
        if card:
            record = record_of(results.figures(card)["records"], case)
            row |= {
                "measured GiB": outcome(record, "allocated_gib"),
                "measured ms": outcome(record, "ms"),
                "kernels alone, ms": outcome(record, "kernel_ms"),
            }
        rows.append(row)
    measured = results.told(card) if card else f"{MISSING} (`python -m benchmarks gpu`, on any CUDA card)"
    return [
        "## Technique by technique",
        f"Forecast: {results.told('forecast')}. Measured: {measured}.",
        table(rows),
        "The example script also encodes each picture anew, in every step; that is left out here"
        f"{_with_vae(results.figures(card)['records']) if card else ''}.",
    ]


def _with_vae(records: dict[str, dict[str, Any]]) -> str:
    record = records.get("example script", {})
    if record.get("status") != "ok":
        return ""
    in_kernels = f", of which {record['kernel_ms']:.3g} ms in kernels" if record["kernel_ms"] else ""
    return f".\nWith it, it took {record['allocated_gib']:.3g} GiB and {record['ms']:,.0f} ms{in_kernels}"


def _under_caps(results: Results) -> Iterator[str]:
    for name in results.gpus("caps_"):
        yield f"## The largest that trains, on {results.told(name)}"
        yield table(
            {
                "cap, base and what is largest": case,
                "batch": record["job"]["batch"],
                "px": record["job"]["side_px"],
                "recomputed": record.get("forecast", {}).get("recomputes"),
                "forecast GiB": record.get("forecast", {}).get("allocated_gib"),
                "measured GiB": outcome(record, "allocated_gib"),
                "ms": outcome(record, "ms"),
            }
            for case, record in results.figures(name)["records"].items()
        )


def _owed(results: Results) -> list[str]:
    """Predictions for a T4, beside what one has shown."""
    records = results.figures("gpu_t4").get("records", {})
    micro = results.figures("gpu_micro_t4").get("records", {}).get("micro", {})
    steps = []
    for label, section, name, case in TECHNIQUES:
        forecast = results.row("forecast", section, name)
        record = record_of(records, case)
        steps.append(
            {
                "one step": label,
                "predicted ms": forecast.get("t4_roofline_ms"),
                "measured ms": outcome(record, "ms", OWED),
                "predicted GiB": forecast.get("allocated_gib"),
                "measured GiB": outcome(record, "allocated_gib", OWED),
            }
        )
    rates = [
        ("matrix products, TFLOPS", T4.gemm_tflops, micro.get("gemm", {}).get("4096x4096x4096")),
        ("convolutions, TFLOPS", T4.conv_tflops, micro.get("conv", {}).get("640@64 NCHW forward")),
        ("attention, TFLOPS", T4.attention_tflops, micro.get("attention", {}).get("10x4096x4096 forward")),
        ("from launch to launch, µs", T4.launch_us, micro.get("launch_us")),
    ]
    return [
        "## Owed on a T4",
        "[gpu.md](gpu.md) says how to measure them in 20 minutes; "
        "this page takes up what that writes, whole or cut off.\n"
        "CUDA's context comes on top of all GiB.",
        table(steps),
        table(
            {"rate": rate, "assumed": assumed, "measured": measured or OWED}
            for rate, assumed, measured in rates
        ),
    ]


def _on_cpus(results: Results) -> list[str]:
    forecast = results.figures("forecast")
    step = results.figures("step")
    ratios = [
        {"CPU seconds of a step": name, "ratio": value} for name, value in step.get("ratios", {}).items()
    ]
    precisions = results.figures("precisions")
    learned = [
        {"base": base, "steps": precisions["steps"], **figures}
        for base, figures in precisions.get("cases", {}).items()
    ]
    # One file, two tables: figures of the model itself, and a row for each stage.
    full = results.figures("full_size")
    whole = {name: figure for name, figure in full.items() if not isinstance(figure, dict)}
    stages = [{"stage": name, **figure} for name, figure in full.items() if isinstance(figure, dict)]

    tables: list[tuple[str, str, Iterable[dict[str, Any]]]] = [
        ("The step against peft's", "step", ratios),
        ("Other precisions on the demo", "precisions", learned),
        ("The forecast against a real allocator", "forecast", forecast.get("accuracy", [])),
        ("What a T4's plan recomputes", "forecast", forecast.get("planner", [])),
        ("What a forecast costs", "forecast", [forecast.get("cost", {})]),
        ("A base model of SDXL's size", "full_size", [whole]),
        ("Every stage on it", "full_size", stages),
        ("Loading", "loading", results.figures("loading").get("rows", [])),
        ("Precompute", "precompute", [results.figures("precompute")]),
        ("The cache", "cache_scale", results.figures("cache_scale").get("rows", [])),
        ("Kills", "kills", [results.figures("kills")]),
    ]
    paragraphs = ["## Without a GPU"]
    for title, name, rows in tables:
        paragraphs += [f"### {title}", f"{results.told(name)}.", table(rows)]
    return paragraphs
