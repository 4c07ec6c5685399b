"""Processes that measure, so that a crash is a result: one for each case, or one for several short checks.

The next ones start early and import while the card is busy, where there are cores and memory for that.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.gpu.cases import Job

AHEAD = 2
CORES_FOR_AHEAD = 8
GIB_FOR_AHEAD = 30
MESSAGE_LENGTH = 300
FORECASTERS = 12


class Workers:
    """Runs one job at a time in other processes. A context manager, so that none is left behind."""

    def __init__(self, settings: dict[str, Any], fork: bool = False) -> None:
        """Settings are of ``device.Settings``; fork shares imports, which CUDA does not survive."""
        self.settings = settings
        self._context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._ahead = 0
        self._waiting: list[_Worker] = []
        self._standing: _Worker | None = None
        self._label = ""
        if fork:
            from benchmarks.gpu import jobs  # noqa: F401 (for the forks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_standing()
        for worker in self._waiting:
            worker.stop(0)

    def look_ahead(self, total_gib: float) -> None:
        """Import early from now on, if the card is large: a waiting process may hold half a GiB of it."""
        if total_gib > GIB_FOR_AHEAD and (os.cpu_count() or 1) >= CORES_FOR_AHEAD:
            self._ahead = AHEAD

    def run(self, timeout_seconds: float, function: str, *arguments: Any, **changes: Any) -> dict[str, Any]:
        """What a function of ``jobs`` gives in a process that ends with it.

        Args:
            timeout_seconds: After which it is stopped.
            function: Its name.
            arguments: Its arguments.
            changes: Of the settings.

        Returns:
            Its figures, with status: ok, out of memory, failed or timed out.
        """
        worker = self._standing or self._next()  # a standing one has said what is here, and holds nothing yet
        self._standing = None
        try:
            return worker.ask(timeout_seconds, self.settings | changes, function, *arguments)
        finally:
            worker.stop(10)

    def ask(
        self, label: str, timeout_seconds: float, function: str, *arguments: Any, **changes: Any
    ) -> dict[str, Any]:
        """The same in a process that goes on, until another label is asked for or a job ends it.

        Args:
            label: Of the process: what is asked under one label shares what is imported, compiled and cached.
            timeout_seconds: As ``run``'s, like all that follow.
            function: Its name.
            arguments: Its arguments.
            changes: Of the settings.
        """
        if label != self._label:
            self._end_standing()
        if self._standing is None:
            self._standing = self._next()
            self._label = label
        answer = self._standing.ask(timeout_seconds, self.settings | changes, function, *arguments)
        if answer["status"] in ("failed", "timed out"):
            self._end_standing()
        return answer

    def _next(self) -> "_Worker":
        while len(self._waiting) <= self._ahead:
            self._waiting.append(_Worker(self._context))
        return self._waiting.pop(0)

    def _end_standing(self) -> None:
        if self._standing is not None:
            self._standing.stop(10)
        self._standing = None

    def forecasts(
        self, jobs: Sequence[Job], caps_gib: Sequence[float], timeout_seconds: float
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Of each job on a card with so much to reserve, as they come; none of those that failed.

        They need no card, and all but one of the cores.

        Args:
            jobs: What is forecast.
            caps_gib: For each of them.
            timeout_seconds: After which the rest is given up.

        Yields:
            A job's number and its forecast.
        """
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        before = {name: os.environ.get(name) for name in hidden}
        os.environ.update(hidden)  # else each process takes its share of the card
        processes = max(1, min(FORECASTERS, (os.cpu_count() or 1) - 1, len(jobs)))
        pool = ProcessPoolExecutor(processes, mp_context=self._context)
        try:
            asked = {
                pool.submit(_forecast, self.settings, job, cap): number
                for number, (job, cap) in enumerate(zip(jobs, caps_gib, strict=True))
            }
            for future in as_completed(asked, timeout_seconds):
                if result := _result(jobs[asked[future]], future):
                    yield asked[future], result
        except TimeoutError:
            print("no forecasts of the rest: the time is over", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _forecast(settings: dict[str, Any], job: Job, cap_gib: float) -> dict[str, Any]:
    from benchmarks.gpu import jobs

    return jobs.forecast(settings, job, cap_gib)


def _result(job: Job, future: Future[dict[str, Any]]) -> dict[str, Any]:
    error = future.exception()
    if error is None:
        return future.result()
    print(f"{job.name}: no forecast: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return {}


class _Worker:
    def __init__(self, context: Any) -> None:
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self._log = Path(name)
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, name), daemon=True)
        self._process.start()
        there.close()

    def ask(self, timeout_seconds: float, *question: Any) -> dict[str, Any]:
        """What it answers; what it said last, where it is gone."""
        try:
            self._here.send(question)
            if not self._here.poll(timeout_seconds):
                self._process.kill()  # it would go on with what nobody waits for
                return {"status": "timed out", "message": f"after {timeout_seconds:.0f} s"}
            return self._here.recv()
        except (EOFError, OSError):
            self._process.join(10)
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        print("\n".join(lines[-30:]), file=sys.stderr, flush=True)
        last = lines[-1] if lines else f"exit code {self._process.exitcode}"
        return {"status": "failed", "message": last[:MESSAGE_LENGTH]}

    def stop(self, patience_seconds: float) -> None:
        """Tell it that nobody asks any more, wait for its end, then end it."""
        with suppress(OSError):  # it is gone already
            self._here.send(None)
        self._process.join(patience_seconds)
        self._process.kill()
        self._process.join()
        self._here.close()
        self._log.unlink(missing_ok=True)


def _serve(connection: Connection, log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)  # what a run prints does not belong between the results
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)  # a fork may have inherited others
    from benchmarks.gpu import jobs

    while True:
        question = connection.recv()
        if question is None:
            return
        settings, function, *arguments = question
        connection.send(jobs.answer(settings, function, *arguments))
