"""A run that is killed at any moment, again and again, ends in the bytes of one that was not."""

import random

from benchmarks.faults.campaigns import result_in, run_straight, run_under_kills
from benchmarks.faults.contenders import Ours
from tests.conftest import TINY

KILLS, MOST_KILLS = 20, 10  # three hundred in `python -m benchmarks faults`


def test_killed_runs_end_in_the_bytes_of_one_that_was_not(data_dir, tmp_path):
    contender = Ours(
        {
            "pretrained_model_name_or_path": str(TINY),
            "train_data_dir": data_dir,
            "resolution": 64,
            "train_batch_size": 1,
            "max_train_steps": 8,
            "checkpointing_steps": 2,
        }
    )
    straight = run_straight(contender, tmp_path / "straight")
    chance, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        found = run_under_kills(contender, tmp_path / f"killed{runs}", chance, 1.2, MOST_KILLS)
        assert found.manual_steps == 0
        assert result_in(contender, tmp_path / f"killed{runs}") == straight
        kills, runs = kills + found.kills, runs + 1
