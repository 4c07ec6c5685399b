"""What one call does: short checks, cases, rates, or the largest under a cap. Each is kept at once."""

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.gpu import timetable
from benchmarks.gpu.book import Book
from benchmarks.gpu.cases import (
    CORE,
    RATE_SECONDS,
    REHEARSED_SHARE,
    REST,
    Case,
    Job,
    Stage,
    cap_grid,
    largest,
    named,
    rehearsed,
)
from benchmarks.gpu.smoke import CHECKS, Check
from benchmarks.gpu.timetable import FIRST_START_SECONDS, Clock, Entry
from benchmarks.gpu.workers import Workers

SPARE_GIB = 0.1  # of what torch can reserve, what libraries take
FORECASTS_SECONDS = 120.0  # for those that come after all cases
UNFINISHED_SECONDS = 10.0  # of a forecast that is given up, until its process ends


@dataclass(frozen=True)
class Call:
    """One call of the program."""

    workers: Workers
    book: Book
    clock: Clock
    options: argparse.Namespace
    usable_gib: float
    """What torch can reserve."""

    def keep(self, name: str, record: dict[str, Any]) -> None:
        """A record; what the call's end has cut off is none."""
        if record["status"] == "timed out" and not self.clock.left():
            print(f"{name}: cut off, the minutes are over", flush=True)
            return
        self.book.add(name, record)

    def left(self, entries: list[Entry[Any]]) -> list[Entry[Any]]:
        """Without what an earlier call has kept, where this one goes on from it."""
        if not self.options.resume:
            return entries
        return [entry for entry in entries if not self.book.holds(entry.job.name)]


def smoke(call: Call) -> None:
    """Short checks, several in one process."""

    def do(check: Check, timeout_seconds: float) -> None:
        changes = {"deterministic": True} if check.is_deterministic else {}
        answer = call.workers.ask(check.process, timeout_seconds, "check", check, **changes)
        call.keep(check.name, answer)

    known = timetable.known_records(call.book.name, call.book.folder)
    entries = call.left(timetable.entries_of_checks(named(CHECKS, call.options.only), known))
    timetable.show(entries, FIRST_START_SECONDS, call.clock)
    timetable.in_time(entries, call.clock, do)


def cases(call: Call) -> None:
    """Steps and stages, each in a process of its own; then the forecasts of those that needed none to run."""
    options = call.options
    jobs = named(CORE if options.quick and not options.only else CORE + REST, options.only)

    def do(job: Job, timeout_seconds: float) -> None:
        call.keep(job.name, _measured(call, job, timeout_seconds))

    known = timetable.known_records(call.book.name, call.book.folder)
    entries = call.left(timetable.entries_of_jobs(jobs, options.warmup + options.steps, known))
    if options.rehearse:  # what a card will need is worth knowing before there is one
        small = {job.name: job for job in rehearsed(jobs)}
        entries = [replace(entry, job=small[entry.job.name]) for entry in entries if entry.job.name in small]
    timetable.show(entries, FIRST_START_SECONDS, call.clock)
    timetable.in_time(entries, call.clock, do)
    _forecast_the_rest(call, [entry.job for entry in entries])


def micro(call: Call) -> None:
    """Rates, one kind after the other; what they predict comes last."""
    goes_on = call.options.resume and call.book.holds("micro")
    record: dict[str, Any] = dict(call.book.records["micro"]) if goes_on else {"status": "ok"}

    def do(part: _Part, timeout_seconds: float) -> None:
        answer = call.workers.ask("first", timeout_seconds, "micro", part.name, record)
        if answer["status"] == "ok":
            record[part.name] = answer[part.name]
        else:
            record.setdefault("failures", {})[part.name] = f"{answer['status']}: {answer['message']}"
        call.book.add("micro", dict(record), answer)

    parts = [Entry(_Part(name), seconds) for name, seconds in RATE_SECONDS.items() if name not in record]
    timetable.show(parts, FIRST_START_SECONDS, call.clock)
    timetable.in_time(parts, call.clock, do)


def caps(call: Call) -> None:
    """Under each cap the largest batch and picture that fit by forecast, planned anew and run."""
    share = REHEARSED_SHARE if call.options.rehearse else 1
    limits = [float(cap) for cap in call.options.caps.split(",")]
    grid = cap_grid(share)
    leanest = dict(call.workers.forecasts(grid, [max(limits)] * len(grid), call.clock.left()))
    forecasts = [leanest.get(number, {}) for number in range(len(grid))]
    for cap in limits:

        def do(case: Case, timeout_seconds: float, cap: float = cap) -> None:
            record = _measured(call, case, timeout_seconds, vram_gib=cap)
            call.keep(f"{cap:g} GiB, {case.name}", {"cap_gib": cap} | record)

        runs = call.options.warmup + call.options.steps
        fitting = largest(grid, forecasts, cap, SPARE_GIB)
        timetable.in_time(timetable.entries_of_jobs(fitting, runs, {}), call.clock, do)


@dataclass(frozen=True)
class _Part:
    name: str


def _measured(call: Call, job: Job, timeout_seconds: float, **changes: Any) -> dict[str, Any]:
    if isinstance(job, Case) and "deterministic" in job.options:
        changes["deterministic"] = True
    function = "stage" if isinstance(job, Stage) else "case"
    answer = call.workers.run(timeout_seconds, function, job, **changes)
    return _with_error({"job": asdict(job)} | answer)


def _forecast_the_rest(call: Call, jobs: list[Job]) -> None:
    """Nothing that runs waits for these: they are for the comparison alone."""
    records = call.book.records
    lacking = [job for job in jobs if job.name in records and "forecast" not in records[job.name]]
    if not lacking:
        return
    seconds = min(FORECASTS_SECONDS, max(0.0, call.clock.left() - UNFINISHED_SECONDS))
    for number, forecast in call.workers.forecasts(lacking, [call.usable_gib] * len(lacking), seconds):
        name = lacking[number].name
        forecast.pop("plan", None)
        records[name] = _with_error(records[name] | {"forecast": forecast})
        call.book.write()


def _with_error(record: dict[str, Any]) -> dict[str, Any]:
    """By how much the forecast is off, where there are both."""
    expected = record.get("forecast", {}).get("allocated_gib")
    measured = record.get("allocated_gib")
    if not expected or not measured or record["status"] != "ok":
        return record
    return record | {"error_percent": 100 * (expected / measured - 1)}
