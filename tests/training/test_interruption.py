"""SIGINT, SIGTERM and max_train_minutes stop a run with a checkpoint; the same command ends it."""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults.campaigns import result_in, run_straight
from benchmarks.faults.contenders import RUN, Ours
from lora_utils import cli
from lora_utils.training import loop

STEPS, LIMIT_MINUTES, STEP_SECONDS = 14, 0.13, 0.6  # more seconds than the limit, however fast the machine


@pytest.fixture(scope="module")
def settings(tiny_settings):
    return tiny_settings | {"train_batch_size": 1, "max_train_steps": STEPS}


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    return run_straight(Ours(settings), tmp_path_factory.mktemp("straight"))


def start(settings, folder, pause_seconds=0.0, **more):
    """``python -m lora_utils train`` in a child, perhaps slowly; what it says goes to a file."""
    given = settings | {"output_dir": RUN, "resume_from_checkpoint": "latest"} | more
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        real = loop.batch_loss
        loop.batch_loss = lambda *given: (time.sleep(pause_seconds), real(*given))[1]
        logging.getLogger().handlers.clear()  # of the tests
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Path("said.txt").open("a", buffering=1) as said:
            sys.stdout = sys.stderr = said
            code = cli.main(["train", *(f"--{name}={value}" for name, value in given.items())])
    finally:
        os._exit(code)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps_in(folder):
    path = folder / RUN / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_steps_end_with_a_checkpoint_and_the_same_command_goes_on(
    settings, straight, tmp_path, number
):
    child = start(settings, tmp_path)
    while len(steps_in(tmp_path)) < 2:
        time.sleep(0.005)
    os.kill(child, number)
    assert exit_code(child) == 130
    last = steps_in(tmp_path)[-1]
    assert last < STEPS
    assert [path.name for path in (tmp_path / RUN / "checkpoints").iterdir()] == [f"step-{last:09d}"]
    assert "stopping at the end of this step, with a checkpoint" in (tmp_path / "said.txt").read_text()
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["status"] == "interrupted"
    assert exit_code(start(settings, tmp_path)) == 0
    assert result_in(Ours(settings), tmp_path) == straight


def test_a_run_of_limited_minutes_pauses_and_the_same_command_ends_in_the_same_bytes(
    settings, straight, tmp_path
):
    starts = 0
    while not starts or json.loads((tmp_path / RUN / "summary.json").read_text())["status"] == "paused":
        assert exit_code(start(settings, tmp_path, STEP_SECONDS, max_train_minutes=LIMIT_MINUTES)) == 0
        starts += 1
        assert starts < 10
    said = (tmp_path / "said.txt").read_text()
    assert starts > 1
    assert said.count("run the same command again to go on") == starts - 1
    assert result_in(Ours(settings), tmp_path) == straight
