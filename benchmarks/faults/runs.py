"""Whole runs that are stopped, killed and started again: the other half of the parts of ``faults``.

Each part takes an empty folder to work in and the minutes that it may take, and returns its figures. *Equal*
means the same weights, the same last checkpoint and the same log as of a run that nobody disturbed, bit by
bit.
"""

import random
import time
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.faults.campaigns import (
    Contender,
    Kills,
    cut_at,
    result_in,
    run_straight,
    run_under_aimed_kills,
    run_under_kills,
)
from benchmarks.faults.contenders import Ours
from benchmarks.training.accelerate_loop import AccelerateLoop
from lora_utils import stages
from lora_utils.tiny.demo_data import draw_demo_data

TINY = Path(stages.__file__).parent / "tiny"
SEED = 0
PICTURES = 10
STEPS = 13
"""More than the pictures, so that some cuts fall into a second epoch."""
KILLED_STEPS = 12
KILLS = 300
"""At least so many, of runs one after the other."""
RUNS = 30
AIMED_RUNS = 10
WINDOW_SECONDS = 0.1
CHOICES = {
    "optimizer": ("adamw", "adamw8bit"),
    "lora_dropout": (0.0, 0.1),
    "gradient_accumulation_steps": (1, 3),
    "enable_bucket": (False, True),
    "dataloader_num_workers": (0, 2),
}


def kills(work: Path, minutes: float) -> dict[str, Any]:
    """Random kills of the whole stage, precompute and all; every third run is mirrored."""
    chance = random.Random(SEED)
    settings = _settings(work) | {"max_train_steps": KILLED_STEPS, "checkpointing_steps": 2}
    plain = Ours(settings)
    mirrored = Ours(settings | {"mirror_dir": "mirror"})

    # Under half of a whole run, so that none gets through at once.
    started = time.monotonic()
    straight = run_straight(plain, work / "straight")
    longest_seconds = 0.45 * (time.monotonic() - started)

    total = Kills()
    equal = 0
    most = 0
    runs = 0
    while total.kills < KILLS or runs < RUNS:
        folder = work / f"killed{runs}"
        contender = mirrored if runs % 3 == 2 else plain
        history = run_under_kills(contender, folder, chance, longest_seconds)
        total = _sum(total, history)
        equal += result_in(contender, folder) == straight
        most = max(most, history.kills)
        runs += 1
    return _figures(total, runs, equal) | {"most_kills_of_a_run": most, "mirrored_runs": runs // 3}


def cuts(work: Path, minutes: float) -> dict[str, Any]:
    """Every cut point of as many combinations of settings as there is time for."""
    deadline = time.monotonic() + 60 * minutes
    settings = _settings(work) | {"max_train_steps": STEPS, "checkpointing_steps": 4}
    combinations = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
    random.Random(SEED).shuffle(combinations)  # when time is over, those that were cut are a fair sample

    started = 0
    made = 0
    equal = 0
    failed = []
    for chosen in combinations:
        if time.monotonic() > deadline:
            break
        # Runs that differ in their cache share none: each prepares it as the settings say.
        cache = work / f"cache{chosen['enable_bucket']}{chosen['dataloader_num_workers']}"
        contender = Ours(settings | chosen | {"precompute_dir": cache})
        straight, copies = cut_at(contender, work / f"cut{started}", range(1, STEPS))
        started += 1
        made += len(copies)
        for step, result in copies.items():
            if result == straight:
                equal += 1
            else:
                failed.append(f"{chosen}, after step {step}")

    return {
        "combinations": started,
        "of": len(combinations),
        "steps": STEPS,
        "cuts": made,
        "equal": equal,
        "not_equal": failed,
    }


def accelerate(work: Path, minutes: float) -> dict[str, Any]:
    """The same cuts, and kills while checkpoints are written, for accelerate's save_state and for us."""
    ours = Ours(_settings(work) | {"precompute_dir": work / "cache", "max_train_steps": KILLED_STEPS})
    # The first of a pair is cut at every step, the second killed while it saves.
    contenders: dict[str, tuple[Contender, Contender]] = {
        "save_state": (AccelerateLoop(TINY, STEPS, 1), AccelerateLoop(TINY, KILLED_STEPS, 2)),
        "ours": (
            Ours(ours.settings | {"max_train_steps": STEPS}),
            Ours(ours.settings | {"checkpointing_steps": 2}),
        ),
    }
    figures: dict[str, Any] = {}
    for name, (cut, killed) in contenders.items():
        straight, copies = cut_at(cut, work / name / "cuts", range(1, STEPS))
        same = [step for step, result in copies.items() if result == straight]
        figures[name] = {"cuts": len(copies), "equal_cuts": len(same), "equal_after_steps": same}
        figures[name]["failed_cuts"] = sum(result is None for result in copies.values())
        figures[name] |= _kill_while_saving(killed, work / name, AIMED_RUNS)
    return figures


def _kill_while_saving(contender: Contender, work: Path, runs: int) -> dict[str, Any]:
    chance = random.Random(SEED)
    total = Kills()
    equal = 0
    straight = run_straight(contender, work / "straight")
    for number in range(runs):
        folder = work / f"aimed{number}"
        total = _sum(total, run_under_aimed_kills(contender, folder, chance, WINDOW_SECONDS))
        equal += result_in(contender, folder) == straight
    figures = {f"aimed_{name}": count for name, count in _figures(total, runs, equal).items()}
    return figures | {"window_seconds": WINDOW_SECONDS}


def _settings(work: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(TINY),
        "train_data_dir": _pictures(work),
        "resolution": 64,
        "min_bucket_reso": 48,  # 256 by default, which no picture here has
        "bucket_reso_steps": 16,
        "train_batch_size": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
    }


def _pictures(work: Path) -> Path:
    """Of two shapes, so that there is something to put into buckets."""
    folder = work / "pictures"
    draw_demo_data(folder)
    images = sorted(path for path in folder.iterdir() if path.suffix != ".txt")
    for number, path in enumerate(images):
        if number >= PICTURES:
            path.unlink()
            path.with_suffix(".txt").unlink()
        elif number % 3 == 0:  # flatter, so that it belongs into another bucket
            with Image.open(path) as image:
                flat = image.crop((0, 0, 64, 40))
            flat.save(path)
    return folder


def _sum(first: Kills, second: Kills) -> Kills:
    return Kills(
        first.kills + second.kills, first.manual_steps + second.manual_steps, first.lost + second.lost
    )


def _figures(total: Kills, runs: int, equal: int) -> dict[str, Any]:
    return {
        "kills": total.kills,
        "runs": runs,
        "equal": equal,
        "manual_steps": total.manual_steps,
        "nothing_left": total.lost,
    }
