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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.record import read, write
from benchmarks.targets.plan import CONTENTS, phases
from benchmarks.targets.sdxl import forecast_of
from benchmarks.targets.trials import Trial, carry_out, settings
from benchmarks.targets.ways import WAYS
from lora_utils import stages
from lora_utils.system.files import file_hash
from lora_utils.tiny.demo_data import draw_demo_data
from lora_utils.tiny.evaluate import FOLDER

NAME = "targets"


def main() -> None:
    """Carry out what is not yet done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e9, help="start no trial after so many")
    parser.add_argument("--processes", type=int, default=2, help="trials at a time, of one thread each")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes

    results = finished()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for content in CONTENTS:
            draw_demo_data(work / content, content=content)
            # Before any trial, so that no two encode the same.
            stages.precompute(settings(Trial("attn", content, 0, 1, 1e-3), work, work / "none"))
        # Spawned: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, context, max_tasks_per_child=20) as pool:
            for name, trials_of in phases():
                trials = [trial for trial in trials_of(results) if trial.key not in results]
                print(f"{name}: {len(trials)} trials to do", flush=True)
                _carry_out_all(name, trials, results, pool, options.processes, work, deadline)
                if time.monotonic() > deadline:
                    break
    keep(results, {way.name: forecast_of(way) for way in WAYS})


def finished() -> dict[str, dict[str, Any]]:
    """Figures of trials on the base that is here, by key; those on another are left out."""
    kept = read(NAME)
    return kept["figures"]["trials"] if kept and kept["figures"]["base"] == base_digest() else {}


def keep(results: dict[str, dict[str, Any]], sdxl: dict[str, Any] | None = None) -> None:
    """Write all figures that there are."""
    earlier = read(NAME)
    known = earlier["figures"]["sdxl"] if earlier else {}
    write(NAME, {"base": base_digest(), "sdxl": sdxl or known, "trials": results}, gpu=None)


def base_digest() -> str:
    """Of the U-Net's weights."""
    return file_hash(FOLDER / "unet" / "diffusion_pytorch_model.safetensors")[:16]


def _carry_out_all(
    phase: str,
    trials: list[Trial],
    results: dict[str, dict[str, Any]],
    pool: ProcessPoolExecutor,
    processes: int,
    work: Path,
    deadline: float,
) -> None:
    """Add figures of trials to results, and keep them one by one."""
    began = time.monotonic()
    running: dict[Future, Trial] = {}
    left = list(trials)
    done = 0
    while running or (left and time.monotonic() < deadline):
        while left and len(running) < processes and time.monotonic() < deadline:
            trial = left.pop(0)
            run = work / "runs" / str(len(trials) - len(left))
            running[pool.submit(carry_out, trial, work, run)] = trial
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            trial = running.pop(future)
            results[trial.key] = {"phase": phase} | asdict(trial) | future.result()
            keep(results)
            done += 1
            minutes = (time.monotonic() - began) / done * (len(trials) - done) / 60
            print(
                f"{done}/{len(trials)}, {minutes:.0f} min left: {trial.key}: {results[trial.key]}", flush=True
            )


if __name__ == "__main__":
    main()
