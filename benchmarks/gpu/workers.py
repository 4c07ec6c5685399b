"""Processes that measure: one for each case, so that memory is clean and a crash is a result.

The next ones start early and import while the card is busy, where there are cores and memory for that.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
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
    """Runs one job at a time, each in a fresh process. A context manager, so that none is left behind."""

    def __init__(self, settings: dict[str, Any], fork: bool = False) -> None:
        """Settings are of ``device.Settings``; fork shares imports, which CUDA does not survive."""
        self._settings = settings
        self._context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._ahead = 0
        self._waiting: list[_Worker] = []
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
        for worker in self._waiting:
            worker.stop(0)

    def look_ahead(self, total_gib: float) -> None:
        """Import early from now on, if the card is large: a waiting process may hold half a GiB of it."""
        if total_gib > GIB_FOR_AHEAD and (os.cpu_count() or 1) >= CORES_FOR_AHEAD:
            self._ahead = AHEAD

    def run(self, timeout_seconds: float, function: str, *arguments: Any, **changes: Any) -> dict[str, Any]:
        """What a function of ``jobs`` gives, with its status: ok, out of memory, failed or timed out.

        Args:
            timeout_seconds: After which it is stopped.
            function: Its name.
            arguments: Its arguments.
            changes: Of the settings.
        """
        while len(self._waiting) <= self._ahead:
            self._waiting.append(_Worker(self._context))
        worker = self._waiting.pop(0)
        try:
            return worker.ask(timeout_seconds, self._settings | changes, function, *arguments)
        finally:
            worker.stop(10)

    def forecasts(self, jobs: Sequence[Job], caps_gib: Sequence[float]) -> list[dict[str, Any]]:
        """Of each job on a card with so much to reserve; empty where that failed. They need no card."""
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        before = {name: os.environ.get(name) for name in hidden}
        os.environ.update(hidden)  # else each process takes its share of the card
        try:
            processes = max(1, min(FORECASTERS, (os.cpu_count() or 1) - 1, len(jobs)))
            with ProcessPoolExecutor(processes, mp_context=self._context) as pool:
                asked = [
                    pool.submit(_forecast, self._settings, job, cap)
                    for job, cap in zip(jobs, caps_gib, strict=True)
                ]
                return [_result(job, future) for job, future in zip(jobs, asked, strict=True)]
        finally:
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
                return {"status": "timed out", "message": f"after {timeout_seconds:g} s"}
            return self._here.recv()
        except (EOFError, OSError):
            self._process.join(10)
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        print("\n".join(lines[-30:]), file=sys.stderr, flush=True)
        last = lines[-1] if lines else f"exit code {self._process.exitcode}"
        return {"status": "failed", "message": last[:MESSAGE_LENGTH]}

    def stop(self, patience_seconds: float) -> None:
        """Wait for its end, then end it."""
        self._process.join(patience_seconds)
        self._process.kill()
        self._process.join()
        self._here.close()
        self._log.unlink(missing_ok=True)


def _serve(connection: Connection, log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    from benchmarks.gpu import jobs

    settings, function, *arguments = connection.recv()
    connection.send(jobs.answer(settings, function, *arguments))
