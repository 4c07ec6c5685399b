"""What each card has shown, and what its figures do not say."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.bars import ratio
from benchmarks.gpu.cases import CORE, REST
from benchmarks.report.tables import MISSING, Results, outcome, record_of, table


def on_gpus(results: Results) -> list[str]:
    """A chapter for each card, a T4 first."""
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
            f"Memory {cap}, {kernels}.{_not_run(records)}",
            table(_gpu_row(case, record, records.get("ours", {})) for case, record in records.items()),
            table(_checks(records)),
            table(bar | {"passed": words[bar["passed"]]} for bar in figures["bars"]),
            *_readings(results, name),
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
                if isinstance(value, int | float) and key != "seconds" and not key.endswith("_gib"):
                    yield {"check": case, "figure": key, "value": f"{value:.6g}"}


def _not_run(records: dict[str, dict[str, Any]]) -> str:
    missing = [job.name for job in CORE + REST if not record_of(records, job.name)]
    return f" Not run yet: {'; '.join(missing)}." if missing else ""


def _readings(results: Results, name: str) -> Iterator[str]:
    """Sentences that keep a reader from taking more out of the tables than is in them."""
    records = results.figures(name)["records"]
    ours = records.get("ours", {})
    if not ours.get("kernel_ms"):
        return
    if ours["ms"] > 2 * ours["kernel_ms"] and name != "gpu_t4":
        yield _waits(records, _launch_us(results, name))

    failed = {bar["what"] for bar in results.figures(name)["bars"] if bar["passed"] is False}
    whole = _t4_seconds(records.get("ours, all recomputed", {}))
    if "all recomputed / ours, kernels alone" in failed and whole and _t4_seconds(ours):
        share = whole / _t4_seconds(ours)
        yield f"The bar that was missed is the time that recomputing costs; a T4's roofline says {share:.3g}."

    cached = ratio(records, "example script, cached latents", "ours", "kernel_ms")
    if cached:
        yield f"Without the VAE in every step, the example script's kernels take {cached:.3g} times ours."


def _waits(records: dict[str, dict[str, Any]], launch_us: float | None) -> str:
    """Why the milliseconds of a quick card are its host's."""
    ours = records["ours"]
    small = records.get("ours, 512 px", {})
    smaller = f" (at 512 px {small['ms']:.0f} and {small['kernel_ms']:.0f})" if small.get("kernel_ms") else ""
    bare = f", where a bare one takes {launch_us:.0f}" if launch_us else ""
    seconds = _t4_seconds(ours)
    roofline = f", which takes {seconds:.2f} s for this step by roofline" if seconds else ""
    return (
        "**Seconds do not carry over to a T4; what tensors take does.** "
        f"A step of ours takes {ours['ms']:.0f} ms and its\nkernels {ours['kernel_ms']:.0f}{smaller}: "
        f"the card waits for the host, {1000 * ours['ms'] / ours['kernels']:.0f} µs for each of "
        f"{ours['kernels']:,}\nlaunches{bare}. So ratios by events compare the hosts' work; "
        f"kernels alone come nearer to what a T4\nwould feel{roofline}."
    )


def _t4_seconds(record: dict[str, Any]) -> float:
    """Of a step on a T4, by roofline; 0 where that was not forecast."""
    return record.get("forecast", {}).get("t4_seconds", 0.0)


def _launch_us(results: Results, name: str) -> float | None:
    """From the rates of the same card."""
    for micro in results.gpus("micro_"):
        if name.removeprefix("gpu_").startswith(micro.removeprefix("gpu_micro_")):
            return results.figures(micro)["records"].get("micro", {}).get("launch_us")
    return None
