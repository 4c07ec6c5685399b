"""Writes docs/benchmarks.md and its picture from benchmarks/results/*.json.

``python -m benchmarks report``. No figure is typed by hand: what no result file holds is "not measured yet".
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from benchmarks.report.picture import draw
from benchmarks.report.tables import MISSING, TECHNIQUES, Results, outcome, table
from lora_utils.memory.cards import T4

RESULTS = ROOT / "benchmarks" / "results"
OWED = "not measured yet on a T4"
FORECAST = {"allocated_gib": "GiB", "reserved_gib": "reserved", "tflop": "TFLOP", "kernels": "kernels"}
"""Columns of a forecast: key in its result file, header."""


def main() -> None:
    """Write page and picture."""
    (ROOT / "docs" / "benchmarks.md").write_text(page(), encoding="utf-8")
    draw(Results(RESULTS), ROOT / "docs" / "benchmarks.png")


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
        *_on_gpus(results),
        *_under_caps(results),
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
            record = results.figures(card)["records"].get(case, {})
            row |= {"measured GiB": outcome(record, "allocated_gib"), "measured ms": outcome(record, "ms")}
        rows.append(row)
    measured = results.told(card) if card else f"{MISSING} (`python -m benchmarks gpu`, on any CUDA card)"
    return [
        "## Technique by technique",
        f"Forecast: {results.told('forecast')}. Measured: {measured}.",
        table(rows),
        "The example script also encodes each picture anew, in every step; that is not in its forecast here.",
    ]


def _on_gpus(results: Results) -> list[str]:
    paragraphs = []
    for name in results.gpus():
        figures = results.figures(name)
        settings = figures["settings"]
        records = figures["records"]
        cap = f"capped at {settings['vram_gib']:g} GiB" if settings["vram_gib"] else "uncapped"
        kernels = f"kernels as on {settings['emulate']}" if settings["emulate"] else "its own kernels"
        words = {True: "yes", False: "no", None: MISSING}
        paragraphs += [
            f"## Measured on {results.told(name)}",
            f"Memory {cap}, {kernels}.",
            table(_gpu_row(case, record, records.get("ours", {})) for case, record in records.items()),
            table(_checks(records)),
            table(bar | {"passed": words[bar["passed"]]} for bar in figures["bars"]),
        ]
    return paragraphs


def _gpu_row(case: str, record: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Of a step or a stage; empty for a check, which has no time and stands in a table of its own."""
    if "ms" not in record and record["status"] == "ok":
        return {}
    # Only a step can be compared with ours: it alone has a loss.
    is_step = "ms" in record and "ms" in ours and "loss" in record
    return {
        "case": case,
        "forecast GiB": record.get("forecast", {}).get("allocated_gib", ""),
        "GiB": outcome(record, "allocated_gib"),
        "forecast off by, %": record.get("error_percent", ""),
        "reserved": outcome(record, "reserved_gib"),
        "ms": outcome(record, "ms"),
        "from": record.get("ms_lowest", ""),
        "to": record.get("ms_highest", ""),
        "times ours": record["ms"] / ours["ms"] if is_step else "",
        "kernels alone, ms": record.get("kernel_ms") or "",
        "launches": record.get("kernels") or "",
    }


def _checks(records: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is no rate: relative errors, seconds of saving and loading."""
    for case, record in records.items():
        if "ms" not in record and record["status"] == "ok":
            for key, value in record.items():
                if isinstance(value, int | float) and not key.endswith("_gib"):
                    yield {"check": case, "figure": key, "value": f"{value:.6g}"}


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
        record = records.get(case, {})
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
        "`python -m benchmarks gpu --micro` measures the rates in about a minute, "
        "`python -m benchmarks gpu` the rest;\n"
        "both write a file to `benchmarks/results/` that this page takes up. "
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
