"""Who writes into a run folder and a cache: whole runs, in this process and beside another one."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lora_utils import stages
from lora_utils.model.lora import WEIGHTS_NAME
from lora_utils.storage.mirror_note import NOTE, look_at
from lora_utils.system import ownership
from lora_utils.system.ownership import LOCK_NAME, InUseError

OWNER = """
import sys, time
from pathlib import Path
from lora_utils.system.ownership import own
held = own(Path(sys.argv[1]), sys.argv[2], "")
print("mine", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owned(tmp_path):
    """Has another process write into a folder."""
    processes = []

    def start(folder, deed):
        process = subprocess.Popen([sys.executable, "-c", OWNER, folder, deed], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == b"mine\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changed", [{}, {"rank": 4}, {"learning_rate": 1e-4}], ids=str)
@pytest.mark.parametrize("resume", ["none", "latest"])
def test_a_run_folder_that_another_process_writes_into_is_left_alone(
    make_config, owned, monkeypatch, tmp_path, changed, resume
):
    cache = tmp_path / "cache"
    folder = make_config().paths.run_folder
    folder.mkdir(parents=True)
    process = owned(folder, "trains into")
    before = contents(folder)
    config = make_config(**changed, precompute_dir=cache, resume_from_checkpoint=resume)
    for stage in (lambda: list(stages.train(config)), lambda: stages.precompute(config)):
        with pytest.raises(InUseError, match=rf"\(pid {process.pid} on .* trains into {folder}; wait for it"):
            stage()
    assert contents(folder) == before
    assert not cache.exists()  # nothing was encoded
    process.kill()
    process.wait()
    assert len(list(stages.train(config))) == 3
    assert not (folder / LOCK_NAME).exists()


def test_a_complete_run_is_read_beside_its_owner(make_config, owned):
    config = make_config(resume_from_checkpoint="latest", num_inference_steps=1)
    list(stages.train(config))
    owned(config.paths.run_folder, "trains into")
    assert list(stages.train(config)) == []
    assert len(stages.compare(config).shots) == 1
    stages.check(config)


def test_an_interrupted_cell_does_not_lock_out_the_next_one(make_config, caplog):
    config = make_config(resume_from_checkpoint="latest", max_train_steps=4)
    left_behind = stages.train(config)  # its loop was interrupted, and its frame is kept with the traceback
    assert [next(left_behind).step, next(left_behind).step] == [1, 2]
    assert [report.step for report in stages.train(config)] == [3, 4]
    assert "had not ended; it is ended first" in caplog.text
    assert list(left_behind) == []


def test_a_call_that_is_dropped_ends_at_once(make_config):
    config = make_config(resume_from_checkpoint="latest")
    for _ in stages.train(config):
        break
    assert (config.paths.run_folder / WEIGHTS_NAME).exists()
    assert not (config.paths.run_folder / LOCK_NAME).exists()


def test_a_cache_that_is_being_filled_is_waited_for_by_whom_lacks_records(
    make_config, owned, monkeypatch, caplog, tmp_path
):
    cache = tmp_path / "cache"
    monkeypatch.setattr(ownership, "ASK_SECONDS", 0.01)
    monkeypatch.setattr(ownership, "TOLD_AFTER_SECONDS", 0.0)
    process = owned(cache, "fills")

    def ends_when_told(record):
        if "waiting until it is done" in record.getMessage():
            process.kill()
        return True

    logging.getLogger(ownership.__name__).addFilter(ends_when_told)
    try:
        assert stages.precompute(make_config(precompute_dir=cache)).encoded_images == 10
    finally:
        logging.getLogger(ownership.__name__).removeFilter(ends_when_told)
    told = [text for text in caplog.messages if "waiting until" in text]
    assert len(told) == 1
    assert f"(pid {process.pid} on " in told[0]
    assert told[0].endswith(f"fills {cache}; waiting until it is done")

    # All is there: nothing to wait for.
    owned(cache, "fills")
    assert stages.precompute(make_config(precompute_dir=cache)).encoded_images == 0
    assert len(list(stages.train(make_config(precompute_dir=cache)))) == 3


def run_on(machine, make_config, drive, **settings):
    """Train on a machine that has nothing; returns its run folder and the steps that were taken."""
    config = make_config(output_dir=machine / "model", mirror_dir=drive, **settings)
    return config.paths.run_folder, [report.step for report in stages.train(config)]


def test_runs_of_one_name_share_a_mirror(make_config, tmp_path, caplog):
    drive = tmp_path / "drive"
    drive.mkdir()
    on = {"make_config": make_config, "drive": drive, "checkpointing_steps": 2}
    run_on(tmp_path / "a", **on)
    first = contents(drive / "model")
    assert look_at(drive / "model").step == 3

    for resume in ("latest", "none"):
        _, steps = run_on(tmp_path / f"b {resume}", **on, rank=4, resume_from_checkpoint=resume)
        assert steps == [1, 2, 3]
        assert contents(drive / "model") == first
    assert "model holds another run (lora_alpha was 16, is 4; rank was 16, is 4)" in caplog.text
    assert (drive / "model-2" / "earlier-1" / WEIGHTS_NAME).exists()

    # The same runs on new machines; a rate that is changed when nothing is left to train is another run.
    for settings, expected in (
        ({}, []),
        ({"max_train_steps": 4}, [4]),
        ({"rank": 4}, []),
        ({"learning_rate": 1e-4, "max_train_steps": 4}, [1, 2, 3, 4]),
        ({"learning_rate": 1e-4, "max_train_steps": 5}, [5]),
    ):
        machine = tmp_path / f"c {settings}"
        folder, steps = run_on(machine, **on, resume_from_checkpoint="latest", **settings)
        assert steps == expected
        assert (folder / WEIGHTS_NAME).exists()
    names = [json.loads(path.read_bytes())["fixed"]["rank"] for path in sorted(drive.glob(f"*/{NOTE}"))]
    assert names == [16, 4, 16]


def test_a_numbered_run_folder_keeps_the_name_that_its_runs_share(make_config):
    paths = make_config(run_name="pets-t4").paths
    for folder, expected in (
        (None, "pets-t4"),
        ("runs/pets-t4", "pets-t4"),
        ("runs/pets-t4-2", "pets-t4"),
        ("runs/run-2", "run-2"),
        ("runs/pets-t4-b", "pets-t4-b"),
        ("pets-t4-10", "pets-t4"),
    ):
        given = paths.model_copy(update={"output_dir": Path(folder) if folder else None})
        assert given.common_name == expected
