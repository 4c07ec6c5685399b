"""What fits the minutes: jobs and the seconds they are expected to take, by what was measured before.

A card is often there for a quarter of an hour only. So a call says beforehand what it will do and leave out,
starts nothing that will not end in time, and ends what takes longer than is left.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from benchmarks import record as results
from benchmarks.gpu.cases import AnyJob, Case, Job
from benchmarks.gpu.smoke import Check

FIRST_START_SECONDS = 40  # a cold import and CUDA's context; 38 s on the card that was measured
START_SECONDS = 12  # of a process, warm; its model, its profile and its end included
PLAN_SECONDS = 5  # counting SDXL's step once or twice, by one core
FORECAST_SECONDS = 1  # for a job, afterwards: several are counted at a time
SETTLING_RUNS = 2  # the profiled one, and the one that shows the loss
COMPILING_SECONDS = 200
UNKNOWN_SECONDS = 10
LEAST_TIMEOUT_SECONDS = 120
PATIENCE = 3  # times as long as expected, after which a job hangs

# Of a step that nobody measured, by the ones that were: 0.58 s for ours, 0.64 s against 0.3 s with an nf4
# base, twice as much with everything recomputed (gpu_h200_sm75.json, gpu_smoke_h200.json).
STEP_SECONDS = 0.6
QUANTISED = 2.2
RECOMPUTED = 2.0
OTHERS = 2.5
KNOWN = Path(__file__).parents[1] / "results"


class Clock:
    """Of one call."""

    def __init__(self, seconds: float) -> None:
        """Begin now."""
        self._end = time.monotonic() + seconds
        self.seconds = seconds
        """In all."""

    def left(self) -> float:
        """Seconds until the call should have ended, at least 0."""
        return max(0.0, self._end - time.monotonic())


@dataclass(frozen=True)
class Entry(Generic[AnyJob]):
    """A job and what it is expected to take."""

    job: AnyJob
    seconds: float


def show(entries: Sequence[Entry[Any]], start_seconds: float, clock: Clock) -> None:
    """Print what will be done, how long it should take, and what will be left out."""
    total = start_seconds
    lines, left_out = [], []
    for entry in entries:
        if total + entry.seconds > clock.seconds:
            left_out.append(entry.job.name)
            continue
        total += entry.seconds
        lines.append(f"{entry.seconds:6.0f} s  {entry.job.name}")
    print("\n".join([f"{start_seconds:6.0f} s  start", *lines]))
    print(f"{total:6.0f} s  expected in all, of {clock.seconds:.0f}")
    if left_out:
        print(f"for which there is no time: {'; '.join(left_out)}")
    print(flush=True)


def in_time(entries: Iterable[Entry[AnyJob]], clock: Clock, do: Callable[[AnyJob, float], None]) -> None:
    """Do one job after the other; what would not end in time is left out, and told.

    Args:
        entries: The jobs.
        clock: Of the call.
        do: Gets a job, and the seconds after which it has to be stopped.
    """
    left_out = []
    for entry in entries:
        if entry.seconds > clock.left():
            left_out.append(entry.job.name)
        else:
            do(entry.job, min(clock.left(), max(LEAST_TIMEOUT_SECONDS, PATIENCE * entry.seconds)))
    if left_out:
        print(f"left out, for the minutes were over: {'; '.join(left_out)}", flush=True)


def entries_of_jobs(jobs: Sequence[Job], runs: int, known: dict[str, dict[str, Any]]) -> list[Entry[Job]]:
    """Of steps and stages, each in a process of its own.

    Args:
        jobs: What is to be done.
        runs: Times that each is run to be measured, warm-up included.
        known: From ``known_records``.
    """
    return [Entry(job, _job_seconds(job, runs + SETTLING_RUNS, known.get(job.name, {}))) for job in jobs]


def entries_of_checks(checks: Sequence[Check], known: dict[str, dict[str, Any]]) -> list[Entry[Check]]:
    """Of short checks, which share processes."""
    entries = []
    label = checks[0].process
    for check in checks:
        seconds = known.get(check.name, {}).get("seconds", check.seconds)
        start = START_SECONDS if check.process != label else 0
        entries.append(Entry(check, seconds + start))
        label = check.process
    return entries


def known_records(name: str, folder: Path | None) -> dict[str, dict[str, Any]]:
    """What result files of a kind hold, by the names of jobs: any card's, and on top of them this card's.

    Args:
        name: Of this card's file, such as gpu_smoke_t4.
        folder: Where this call keeps it, if it does.
    """
    kind = next((kind for kind in ("gpu_smoke_", "gpu_micro_", "gpu_caps_") if name.startswith(kind)), "gpu_")
    others = [] if kind != "gpu_" else ["gpu_smoke_", "gpu_micro_", "gpu_caps_"]
    known: dict[str, dict[str, Any]] = {}
    files = [file.stem for file in sorted(KNOWN.glob(f"{kind}*.json"))]
    for stem in [stem for stem in files if not stem.startswith(tuple(others))]:
        known |= _records(stem, KNOWN)
    return known | _records(name, KNOWN) | _records(name, folder)


def _records(name: str, folder: Path | None) -> dict[str, dict[str, Any]]:
    content = results.read(name, folder) if folder else None
    records = content["figures"]["records"] if content else {}
    return {job: record for job, record in records.items() if record["status"] == "ok"}


def _job_seconds(job: Job, runs: int, record: dict[str, Any]) -> float:
    overhead = START_SECONDS + FORECAST_SECONDS
    if isinstance(job, Case) and job.way == "ours" and job.plan == "auto":
        overhead += PLAN_SECONDS
    if isinstance(job, Case) and "compile" in job.options:
        overhead += COMPILING_SECONDS
    if "ms" in record:
        return overhead + runs * record["ms"] / 1000
    if "seconds" in record:
        return overhead + record["seconds"]
    return overhead + (runs * _step_seconds(job) if isinstance(job, Case) else UNKNOWN_SECONDS)


def _step_seconds(case: Case) -> float:
    """Of a step that nobody measured."""
    seconds = STEP_SECONDS * case.batch * (case.side_px / 1024) ** 2
    seconds *= QUANTISED if case.base != "fp16" else 1
    seconds *= RECOMPUTED if case.plan == "full" else 1
    return seconds * (OTHERS if case.way != "ours" or "peft" in case.options else 1)
