"""The step on a CUDA card: ``python -m benchmarks gpu``. Random SDXL-shaped weights; nothing is downloaded.

Our step against what others' scripts do, every case in a process of its own: milliseconds by events, summed
kernel time, launches, memory beside its forecast; then all other stages and checks of the arithmetic.

--smoke checks that what holds on a CPU holds on the card: nodes, training, equal bytes, a full card, a run
of 50 steps. --quick takes the most telling cases. Each is made for eight minutes: it says beforehand what it
will do and how long that takes, the most telling first, and what the minutes leave out. --micro measures the
card's rates alone, in two minutes. --caps finds the largest batch and picture that the forecast allows
under each cap and runs them.

Results are in benchmarks/results/gpu_<card>.json, or in the folder that --out names, after every case, beside
those of earlier calls; --resume leaves out what is there from the same commit. --emulate sm75 --vram-gib 14.3
is a T4's memory and choice of kernels on a larger card, not its speed. --rehearse runs everything on the CPU
with small shapes, and keeps it only where --out says so. docs/gpu.md says how to do this on Colab.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record as results
from benchmarks.gpu import modes
from benchmarks.gpu.book import Book, file_name
from benchmarks.gpu.cases import T4_GIB
from benchmarks.gpu.timetable import Clock
from benchmarks.gpu.workers import Workers
from benchmarks.report.smoke import told

MINUTES = 8.0
STEPS = 12
QUICK_STEPS = 5
FIRST_TIMEOUT_SECONDS = 300  # a cold import of all libraries, from a slow disk


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for, keep it, and say what it shows."""
    options = _options(arguments)
    clock = Clock(60 * options.minutes)
    with (
        tempfile.TemporaryDirectory() as work,
        Workers(_settings(options, work), fork=options.rehearse) as workers,
    ):
        card = workers.ask("first", FIRST_TIMEOUT_SECONDS, "describe")
        if card["status"] != "ok" or not (card["gpu"] or options.rehearse):
            missing = "there is no CUDA card here (in Colab: Runtime, Change runtime type, T4 GPU)"
            raise SystemExit(f"{card.get('message', missing)}; --rehearse needs none")
        book = _book(card, options)
        call = modes.Call(workers, book, clock, options, options.vram_gib or card.get("usable_gib") or T4_GIB)
        if card["gpu"] and not options.micro:  # which has but one process
            workers.look_ahead(card["gpu"]["total_gib"])
        if options.micro:
            modes.micro(call)
        elif options.smoke:
            modes.smoke(call)
            print("\n".join(told(book.records)))
        elif options.caps:
            modes.caps(call)
        else:
            modes.cases(call)
            _print_bars(book)
    if book.path:
        print(f"the result file is {book.path}")
    if book.failed:
        raise SystemExit(f"failed: {'; '.join(book.failed)}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--smoke", action="store_true", help="whether what holds on a CPU holds here")
    what.add_argument("--quick", action="store_true", help="the most important cases, five steps each")
    what.add_argument("--micro", action="store_true", help="rates of the card alone")
    what.add_argument("--caps", metavar="GIB,GIB,...", help="the largest that trains under each cap")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="may be repeated")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results are kept; benchmarks/results if not given"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what is kept of this commit")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in which the call ends; %(default)g")
    parser.add_argument("--vram-gib", type=float, help="most that torch may reserve")
    parser.add_argument("--emulate", choices=["sm75"], help="the kernels that a T4 would run")
    parser.add_argument("--warmup", type=int, help="steps before those")
    parser.add_argument("--steps", type=int, help=f"of each case; {STEPS}, or {QUICK_STEPS} of short calls")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--commit", help="of this code, where git cannot tell")
    options = parser.parse_args(arguments)
    if options.warmup is None:
        options.warmup = 1 if options.caps else 3
    if options.steps is None:
        options.steps = 2 if options.caps else QUICK_STEPS if options.quick or options.smoke else STEPS
    return options


def _settings(options: argparse.Namespace, work: str) -> dict[str, Any]:
    """Of ``device.Settings``."""
    return {
        "vram_gib": options.vram_gib,
        "emulate": options.emulate,
        "warmup": 0 if options.rehearse else options.warmup,
        "steps": 1 if options.rehearse else options.steps,
        "rehearse": options.rehearse,
        "work": work,
    }


def _book(card: dict[str, Any], options: argparse.Namespace) -> Book:
    program = "micro_" if options.micro else "smoke_" if options.smoke else "caps_" if options.caps else ""
    folder = options.out or (None if options.rehearse else results.FOLDER)
    settings = {"vram_gib": options.vram_gib, "emulate": options.emulate}
    return Book(
        file_name(program, card["gpu"], options.emulate),
        folder,
        card["gpu"],
        options.commit or results.commit(),
        settings,
        has_bars=not program,
    )


def _print_bars(book: Book) -> None:
    for bar in book.bars():
        value = "not measured" if bar["value"] is None else f"{bar['value']:.3g}"
        verdict = {None: "", True: "pass", False: "FAIL"}[bar["passed"]]
        print(f"{bar['what']}: {value} (bar {bar['bar']:g}) {verdict}")
