"""Whether precompute, killed at random moments, ends in the same cache.

``python -m benchmarks kills [--kills 100]``; CPU, tiny SDXL.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.faults.precompute_kills import contents, precompute_under_kills, same
from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.tiny.demo_data import draw_demo_data

TINY = Path(stages.__file__).parent / "tiny"


def main() -> None:
    """Run the campaign, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # children that are forked from more threads hang

    generator = random.Random(options.seed)
    kills = 0
    runs = 0
    equal = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        draw_demo_data(work / "pictures")
        settings = {
            "pretrained_model_name_or_path": str(TINY),
            "train_data_dir": work / "pictures",
            "resolution": 64,
            "random_flip": True,
            "dataloader_num_workers": 0,
        }
        straight = contents(
            stages.precompute(load_config(None, settings | {"precompute_dir": work / "straight"}))
        )
        while kills < options.kills:
            config = load_config(None, settings | {"precompute_dir": work / f"killed{runs}"})
            kills += precompute_under_kills(config, generator, longest_seconds=1.5)
            runs += 1
            # Asked once more, it must find all of it encoded.
            again = stages.precompute(config)
            equal += same(contents(again), straight) and again.encoded_images == again.encoded_captions == 0

    seconds = round(time.monotonic() - started)
    record.save(
        "kills", {"kills": kills, "runs": runs, "same_cache": equal, "manual_steps": 0, "seconds": seconds}
    )
