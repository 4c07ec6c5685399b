"""The step on a CUDA card: ``python -m benchmarks gpu``. Random SDXL-shaped weights; nothing is downloaded.

Our step against what others' scripts do, every case in a process of its own: milliseconds by events, summed
kernel time, launches, memory beside its forecast; then all other stages and checks of the arithmetic. Results
are kept in benchmarks/results/gpu_<card>.json after every case, beside those of earlier runs.

--micro measures the card's rates alone, in about a minute. --caps finds the largest batch and picture that
the forecast allows under each cap and runs them. --emulate sm75 --vram-gib 14.3 is a T4's memory and choice
of kernels on a larger card, not its speed. --rehearse runs everything on the CPU with small shapes, and keeps
nothing.
"""

import argparse
import re
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from benchmarks import record as results
from benchmarks.gpu import cases
from benchmarks.gpu.cases import Case, Job
from benchmarks.gpu.workers import Workers

T4_GIB = 14.3
SPARE_GIB = 0.1  # what torch can reserve there, and what libraries take of that
TIMEOUT_SECONDS = 240


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for, keep it, and print the bars."""
    options = _options(arguments)
    short = options.rehearse or options.caps is not None
    settings = {
        "vram_gib": options.vram_gib,
        "emulate": options.emulate,
        "warmup": 0 if options.rehearse else 1 if short else options.warmup,
        "steps": 1 if options.rehearse else 2 if short else 5 if options.quick else options.steps,
        "rehearse": options.rehearse,
    }
    with Workers(settings, fork=options.rehearse) as workers:
        card = workers.run(120, "describe")
        if card["status"] != "ok" or not (card["gpu"] or options.rehearse):
            reason = card.get(
                "message", "there is no CUDA card here (in Colab: Runtime, Change runtime type, T4 GPU)"
            )
            raise SystemExit(f"{reason}; --rehearse needs none")
        book = Book(card, options)
        if card["gpu"]:
            workers.look_ahead(card["gpu"]["total_gib"])
        if options.micro:
            book.add("micro", workers.run(900, "micro"))
        elif options.caps:
            _run_caps(workers, book, options)
        else:
            _run_cases(workers, book, options)
            book.print_bars()
    failed = [name for name, record in book.records.items() if record["status"] in ("failed", "timed out")]
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--vram-gib", type=float, help="most that torch may reserve")
    parser.add_argument("--emulate", choices=["sm75"], help="the kernels that a T4 would run")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=9, help="no case is started after this")
    parser.add_argument("--quick", action="store_true", help="the most important cases, five steps each")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="these cases; may be repeated"
    )
    parser.add_argument("--caps", metavar="GIB,GIB,...", help="the largest that trains under each cap")
    parser.add_argument("--micro", action="store_true", help="rates of the card alone")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--commit", help="of this code, where git cannot tell")
    return parser.parse_args(arguments)


class Book:
    """The records so far; written after each."""

    def __init__(self, card: dict[str, Any], options: argparse.Namespace) -> None:
        self._gpu = card["gpu"]
        self._options = options
        self.usable_gib: float = options.vram_gib or card.get("usable_gib") or T4_GIB
        prefix = "micro_" if options.micro else "caps_" if options.caps else ""
        name = re.sub(r"nvidia|tesla|geforce", "", self._gpu["name"].lower()) if self._gpu else "rehearsal"
        self._name = f"gpu_{prefix}{'-'.join(name.split())}" + (
            f"_{options.emulate}" if options.emulate else ""
        )
        earlier = None if options.rehearse else results.read(self._name)
        self.records: dict[str, dict[str, Any]] = earlier["figures"]["records"] if earlier else {}

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Print and keep."""
        commit = self._options.commit or results.commit()
        self.records[name] = record | {"date": datetime.now(UTC).date().isoformat(), "commit": commit}
        print(f"{name}: {_line(record)}", flush=True)
        if not self._options.rehearse:
            path = results.write(self._name, self._figures(), self._gpu, commit)
            if self._options.micro:
                print(f"the result file is {path}")

    def print_bars(self) -> None:
        """What the figures have to show, and whether they do."""
        for bar in cases.bars(self.records):
            value = "not measured" if bar["value"] is None else f"{bar['value']:.3g}"
            verdict = {None: "", True: "pass", False: "FAIL"}[bar["passed"]]
            print(f"{bar['what']}: {value} (bar {bar['bar']:g}) {verdict}")

    def _figures(self) -> dict[str, Any]:
        settings = {"vram_gib": self._options.vram_gib, "emulate": self._options.emulate}
        bars = [] if self._options.micro or self._options.caps else cases.bars(self.records)
        return {"settings": settings, "bars": bars, "records": self.records}


def _run_cases(workers: Workers, book: Book, options: argparse.Namespace) -> None:
    started = time.monotonic()
    jobs = cases.chosen(options.only, options.quick)
    if options.rehearse:
        jobs = cases.rehearsed(jobs)
    forecasts = workers.forecasts(jobs, [book.usable_gib] * len(jobs))
    print(f"{len(jobs)} forecasts: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    for job, forecast in zip(jobs, forecasts, strict=True):
        if time.monotonic() - started > 60 * options.minutes:
            print(f"{job.name}: not started, {options.minutes:g} minutes are over")
            continue
        book.add(job.name, _record(workers, job, forecast))


def _run_caps(workers: Workers, book: Book, options: argparse.Namespace) -> None:
    share = cases.REHEARSED_SHARE if options.rehearse else 1
    caps = [float(cap) for cap in options.caps.split(",")]
    grid = cases.cap_grid(share)
    leanest = workers.forecasts(grid, [max(caps)] * len(grid))
    tried = [(cap, case) for cap in caps for case in cases.largest(grid, leanest, cap, SPARE_GIB)]
    forecasts = workers.forecasts([case for _, case in tried], [cap for cap, _ in tried])
    for (cap, case), forecast in zip(tried, forecasts, strict=True):
        book.add(
            f"{cap:g} GiB, {case.name}", {"cap_gib": cap} | _record(workers, case, forecast, vram_gib=cap)
        )


def _record(workers: Workers, job: Job, forecast: dict[str, Any], **changes: Any) -> dict[str, Any]:
    plan = forecast.pop("plan", None)
    function = "case" if isinstance(job, Case) else "stage"
    record = {"job": asdict(job)} | workers.run(TIMEOUT_SECONDS, function, job, plan, **changes)
    if forecast:
        record["forecast"] = forecast
    if forecast and record.get("allocated_gib") and record["status"] == "ok":
        record["error_percent"] = 100 * (forecast["allocated_gib"] / record["allocated_gib"] - 1)
    return record


def _line(record: dict[str, Any]) -> str:
    shown = {
        name: value for name, value in record.items() if name != "status" and not isinstance(value, dict)
    }
    parts = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shown.items()
    ]
    expected = record.get("forecast", {}).get("allocated_gib")
    return ", ".join([record["status"], *parts, *([f"forecast {expected:.4g} GiB"] if expected else [])])
