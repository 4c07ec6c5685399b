"""What a mirrored run survives on a Google Drive's bad days.

``python -m benchmarks drive [--rounds 1000]``; CPU, no network, a fake drive. A round is one to three
checkpoints while the drive fails, is late or loses what it was given; after every second one, on average, the
machine is lost, and another restores from what is left.
"""

import argparse
import logging
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.faults.drive_campaign import Campaign

ROUNDS_PER_RUN = 40
"""Then a new run begins, in an empty mirror: the drive is looked through whole, again and again."""


def main() -> None:
    """Run the campaign, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lora_utils").setLevel(logging.ERROR)  # it warns of every fault, as it should

    counts = Counter()
    wrong = []
    started = time.monotonic()
    for number in range(-(-options.rounds // ROUNDS_PER_RUN)):
        with tempfile.TemporaryDirectory() as work:
            campaign = Campaign(Path(work), options.seed + number)
            campaign.play(min(ROUNDS_PER_RUN, options.rounds - number * ROUNDS_PER_RUN))
            counts += campaign.counts
            wrong += [f"seed {options.seed + number}: {problem}" for problem in campaign.wrong]

    seconds = round(time.monotonic() - started)
    record.save("drive", {**dict(sorted(counts.items())), "broken promises": wrong, "seconds": seconds})
