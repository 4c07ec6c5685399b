"""Which layers a LoRA should adapt: every set of them tuned equally, trained and judged on the tiny SDXL.

``python -m benchmarks targets``: sets of layers x two styles and a subject x three seeds, at equal steps and
at equal cost; a control that must lose and one that must win; then rank, steps and caption dropout of the
best. Learning rate and alpha are chosen by held-out loss on a seed that the table does not use, from the same
values for each. A trial that is in the result file is not done again, so a run that was cut off goes on.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.record import FOLDER as RESULTS_FOLDER
from benchmarks.record import commit
from benchmarks.targets.kept import finished, keep, stands_on
from benchmarks.targets.plan import CONTENTS, phases
from benchmarks.targets.sdxl import forecast_of
from benchmarks.targets.trials import Trial, carry_out, settings
from benchmarks.targets.ways import WAYS
from lora_utils import stages
from lora_utils.system.ownership import own
from lora_utils.tiny.demo_data import draw_demo_data


def main() -> None:
    """Carry out what is not yet done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no trial after so many")
    parser.add_argument("--processes", type=int, default=2, help="trials at a time, of one thread each")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes

    with own(RESULTS_FOLDER, "measures into", "go on later"), tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for content in CONTENTS:
            draw_demo_data(work / content, content=content)
            # Before any trial, so that no two encode the same.
            stages.precompute(settings(Trial("attn", content, 0, 1, 1e-3), work, work / "none"))
        sdxl = {way.name: forecast_of(way) for way in WAYS}
        results = finished(work)
        tables: dict[str, list[str]] = {}

        # Spawned: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, context, max_tasks_per_child=20) as pool:
            for name, trials_of in phases():
                trials = trials_of(results)
                tables[name] = [trial.key for trial in trials]
                missing = [trial for trial in dict.fromkeys(trials) if trial.key not in results]
                print(f"{name}: {len(missing)} trials to do", flush=True)
                for trial, figures in _carried_out(missing, pool, options.processes, work, deadline):
                    results[trial.key] = figures
                    keep(results, tables, sdxl)
                if time.monotonic() > deadline:
                    break
        keep(results, tables, sdxl)


def _carried_out(
    trials: Sequence[Trial], pool: ProcessPoolExecutor, processes: int, work: Path, deadline: float
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Trials with their figures, as they come."""
    began = time.monotonic()
    code = commit()
    running: dict[Future, Trial] = {}
    left = list(trials)
    done = 0
    while running or (left and time.monotonic() < deadline):
        while left and len(running) < processes and time.monotonic() < deadline:
            trial = left.pop(0)
            running[pool.submit(carry_out, trial, work)] = trial
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            trial = running.pop(future)
            figures = future.result()
            done += 1
            minutes = (time.monotonic() - began) / done * (len(trials) - done) / 60
            print(f"{done}/{len(trials)}, {minutes:.0f} min left: {trial.key}: {figures}", flush=True)
            yield trial, asdict(trial) | stands_on(trial, work) | {"commit": code} | figures


if __name__ == "__main__":
    main()
