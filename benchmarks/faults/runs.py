"""Whole runs that are stopped, killed and started again, for benchmarks/faults.py."""

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
PICTURES, STEPS, KILLED_STEPS, SEED = 10, 13, 12, 0
KILLS, RUNS = 300, 30
AIMED_RUNS, WINDOW_SECONDS = 10, 0.1
CHOICES = {
    "optimizer": ("adamw", "adamw8bit"),
    "lora_dropout": (0.0, 0.1),
    "gradient_accumulation_steps": (1, 3),
    "enable_bucket": (False, True),
    "dataloader_num_workers": (0, 2),
}


def kills(work: Path, minutes: float) -> dict[str, Any]:
    """Random kills of the whole stage, precompute and all, a checkpoint every second step; every third run mirrored."""
    settings, chance = (
        _settings(work) | {"max_train_steps": KILLED_STEPS, "checkpointing_steps": 2},
        random.Random(SEED),
    )
    plain, mirrored = Ours(settings), Ours(settings | {"mirror_dir": "mirror"})
    started = time.monotonic()
    straight = run_straight(plain, work / "straight")
    longest_seconds = 0.45 * (time.monotonic() - started)
    found, equal, most = Kills(), 0, 0
    runs = 0
    while found.kills < KILLS or runs < RUNS:
        folder, contender = work / f"killed{runs}", mirrored if runs % 3 == 2 else plain
        one = run_under_kills(contender, folder, chance, longest_seconds)
        found = _sum(found, one)
        equal += result_in(contender, folder) == straight
        runs, most = runs + 1, max(most, one.kills)
    return _told(found, runs, equal) | {"most_kills_of_a_run": most, "mirrored_runs": runs // 3}


def cuts(work: Path, minutes: float) -> dict[str, Any]:
    """Every cut point of as many combinations of settings as there is time for."""
    deadline, started = time.monotonic() + 60 * minutes, 0
    combinations = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
    random.Random(SEED).shuffle(combinations)
    made = equal = 0
    settings, failed = _settings(work) | {"max_train_steps": STEPS, "checkpointing_steps": 4}, []
    for chosen in combinations:
        if time.monotonic() > deadline:
            break
        cache = work / f"cache{chosen['enable_bucket']}{chosen['dataloader_num_workers']}"
        contender = Ours(settings | chosen | {"precompute_dir": cache})
        straight, found = cut_at(contender, work / f"cut{started}", range(1, STEPS))
        made, equal = made + len(found), equal + sum(one == straight for one in found.values())
        failed += [f"{chosen}, after step {step}" for step, one in found.items() if one != straight]
        started += 1
    return {
        "combinations": started,
        "of": len(combinations),
        "steps": STEPS,
        "cuts": made,
        "equal": equal,
    } | {"not_equal": failed}


def accelerate(work: Path, minutes: float) -> dict[str, Any]:
    """The same cuts, and kills while checkpoints are written, for a loop around accelerate's save_state and for us."""
    ours = Ours(_settings(work) | {"precompute_dir": work / "cache", "max_train_steps": KILLED_STEPS})
    found: dict[str, Any] = {}
    for name, every_step, every_second in (
        ("save_state", AccelerateLoop(TINY, STEPS, 1), AccelerateLoop(TINY, KILLED_STEPS, 2)),
        (
            "ours",
            Ours(ours.settings | {"max_train_steps": STEPS}),
            Ours(ours.settings | {"checkpointing_steps": 2}),
        ),
    ):
        straight, cut = cut_at(every_step, work / name / "cuts", range(1, STEPS))
        same = [step for step, one in cut.items() if one == straight]
        found[name] = {"cuts": len(cut), "equal_cuts": len(same), "equal_after_steps": same}
        found[name]["failed_cuts"] = sum(one is None for one in cut.values())
        found[name] |= _kill_while_saving(every_second, work / name, AIMED_RUNS)
    return found


def _kill_while_saving(contender: Contender, work: Path, runs: int) -> dict[str, Any]:
    chance, total, equal = random.Random(SEED), Kills(), 0
    straight = run_straight(contender, work / "straight")
    for number in range(runs):
        total = _sum(total, run_under_aimed_kills(contender, work / f"aimed{number}", chance, WINDOW_SECONDS))
        equal += result_in(contender, work / f"aimed{number}") == straight
    told = _told(total, runs, equal)
    return {f"aimed_{name}": told[name] for name in told} | {"window_seconds": WINDOW_SECONDS}


def _settings(work: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(TINY),
        "train_data_dir": _pictures(work),
        "resolution": 64,
        "min_bucket_reso": 48,
        "bucket_reso_steps": 16,
        "train_batch_size": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
    }


def _pictures(work: Path) -> Path:
    """Of two shapes, so that there is something to put into buckets."""
    folder = work / "pictures"
    draw_demo_data(folder)
    images = sorted(one for one in folder.iterdir() if one.suffix != ".txt")
    for number, path in enumerate(images):
        if number >= PICTURES:
            path.unlink()
            path.with_suffix(".txt").unlink()
        elif number % 3 == 0:
            with Image.open(path) as image:
                flat = image.crop((0, 0, 64, 40))
            flat.save(path)
    return folder


def _sum(first: Kills, second: Kills) -> Kills:
    return Kills(
        first.kills + second.kills, first.manual_steps + second.manual_steps, first.lost + second.lost
    )


def _told(found: Kills, runs: int, equal: int) -> dict[str, Any]:
    counts = {"kills": found.kills, "runs": runs, "equal": equal, "manual_steps": found.manual_steps}
    return counts | {"nothing_left": found.lost}
