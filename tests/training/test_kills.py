"""A run that is killed at any moment, again and again, ends in the bytes of one that was not."""

import random

import pytest

from benchmarks.faults import children
from benchmarks.faults.campaigns import cut_at, result_in, run_straight, run_under_kills
from benchmarks.faults.contenders import Ours

KILLS, MOST_KILLS = 20, 10  # three hundred in `python -m benchmarks faults`


@pytest.fixture
def contender(tiny_settings):
    steps = {"max_train_steps": 8, "checkpointing_steps": 2}
    return Ours(tiny_settings | {"train_batch_size": 1, "precompute_dir": None} | steps)


def test_killed_runs_end_in_the_bytes_of_one_that_was_not(contender, tmp_path):
    straight = run_straight(contender, tmp_path / "straight")
    chance, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        found = run_under_kills(contender, tmp_path / f"killed{runs}", chance, 1.2, MOST_KILLS)
        assert found.manual_steps == 0
        assert result_in(contender, tmp_path / f"killed{runs}") == straight
        kills, runs = kills + found.kills, runs + 1


def test_fresh_processes_do_as_forked_ones(contender, tmp_path, monkeypatch):
    """Beside a card, which no fork survives."""
    straight = run_straight(contender, tmp_path / "forked")
    monkeypatch.setattr(children, "are_forked", lambda: False)
    assert cut_at(contender, tmp_path / "fresh", [2]) == (straight, {2: straight})
