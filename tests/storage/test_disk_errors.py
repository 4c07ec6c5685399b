"""A full or failing disk: training goes on, old checkpoints stay, new ones come when the disk is well."""

import errno

import pytest

from benchmarks.faults.disk_errors import fill_up, listening, small_disk, survive_all
from benchmarks.faults.operations import without_syncing
from lora_utils import stages
from lora_utils.model import lora

STEPS, FULL_AFTER, FREE_AFTER = 6, 2, 4


@pytest.fixture
def heard():
    with listening() as ear:
        yield ear


def test_an_error_at_any_operation_of_a_checkpoint_loses_nothing_and_is_told_in_one_sentence(tmp_path, heard):
    with without_syncing():
        outcomes = survive_all(
            tmp_path, (errno.ENOSPC,), heard
        )  # and EIO, ENOTCONN, ESTALE in `python -m benchmarks faults`
    assert sum(outcomes.values()) > 80
    assert {outcome.split(", ")[1] for outcome in outcomes} == {"newest 2", "newest 3"}


@pytest.mark.parametrize("spare_bytes", [2**20, 0])
def test_a_disk_that_fills_up_stops_checkpoints_but_not_the_run(make_config, tmp_path, heard, spare_bytes):
    straight = make_config(max_train_steps=STEPS)
    for _ in stages.train(straight):
        pass
    try:
        with small_disk(tmp_path / "disk", 100) as disk:
            config = make_config(output_dir=disk / "run", max_train_steps=STEPS, checkpointing_steps=1)
            for report in stages.train(config):
                if report.step == FULL_AFTER:
                    filler = fill_up(disk, spare_bytes)
                elif report.step == FREE_AFTER:
                    filler.unlink()
            kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
            weights = (disk / "run" / lora.WEIGHTS_NAME).read_bytes()
    except PermissionError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    said = "\n".join(heard())
    assert "no checkpoint of step 3 (" in said
    assert "the one of step 2 is kept" in said
    assert "checkpoints are made again, from step 5 on" in said
    assert kept == ["step-000000005", "step-000000006"]
    assert weights == (straight.paths.output_dir / lora.WEIGHTS_NAME).read_bytes()
