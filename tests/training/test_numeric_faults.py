"""Numbers that are not finite: a few steps are left out and named, many stop the run, none reach the disk."""

import logging
from types import SimpleNamespace

import pytest
import torch

from benchmarks.faults.small_checkpoints import ABOUT, metrics_at, state_at
from lora_utils import stages
from lora_utils.model import lora
from lora_utils.storage.checkpoint import CheckpointError, flatten_state, read_checkpoint, write_checkpoint
from lora_utils.system.files import read_folder
from lora_utils.training import loop
from lora_utils.training.loop import DivergenceError

NAN = float("nan")


@pytest.fixture
def batches(monkeypatch):
    """Lets a function be called in place of the loss of some micro-batches, counted from 1."""
    real, faults = loop.batch_loss, SimpleNamespace(count=0, at={})

    def batch_loss(run, batch, first):
        faults.count += 1
        loss = real(run, batch, first)
        return faults.at.get(faults.count, lambda run, loss: loss)(run, loss)

    monkeypatch.setattr(loop, "batch_loss", batch_loss)
    return faults


def adapter_of(run):
    return next(one for one in run.unet.parameters() if one.requires_grad)


def nan_loss(run, loss):
    return loss * NAN


def nan_gradient(run, loss):
    hook = adapter_of(run).register_hook(lambda gradient: [gradient * NAN, hook.remove()][0])
    return loss


def nan_weight(run, loss):
    adapter_of(run).data[0, 0] = NAN
    return loss * NAN


def assert_finite_on_disk(output_dir):
    for folder in (output_dir / "checkpoints").iterdir():
        tensors, _ = flatten_state(read_checkpoint(folder).state)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
        assert not any(
            b"NaN" in content for name, content in read_folder(folder).items() if name.endswith(".json")
        )


@pytest.mark.parametrize("fault", [nan_loss, nan_gradient])
def test_a_bad_step_is_left_out_and_named_and_training_goes_on(make_config, batches, caplog, fault):
    config = make_config(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=5)
    batches.at = {3: fault}
    reports = list(stages.train(config))
    assert [report.step for report in reports if report.grad_norm is None] == [3]
    told = [message for message in caplog.messages if "step 3 is left out" in message]
    assert len(told) == 1
    assert "learning rate" in told[0]
    assert ".png" in told[0] or ".jpg" in told[0]
    before, after = (state_of(config, step) for step in (2, 3))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state_of(config, 4).items())
    assert_finite_on_disk(config.paths.output_dir)


def state_of(config, step):
    return read_checkpoint(config.paths.output_dir / "checkpoints" / f"step-{step:09d}").state["adapter"]


def test_many_bad_steps_in_a_row_stop_the_run_and_name_samples_rate_and_last_good_checkpoint(
    make_config, batches
):
    config = make_config(max_train_steps=9, checkpointing_steps=2, max_skipped_steps=3)
    batches.at = dict.fromkeys(range(3, 99), nan_loss)
    with pytest.raises(
        DivergenceError, match=r"examples .*\.(png|jpg).*the last good checkpoint is of step"
    ) as told:
        list(stages.train(config))
    assert "for 3 steps" in str(told.value)
    assert "learning rate 0.001" in str(told.value)
    assert_finite_on_disk(config.paths.output_dir)


def test_an_adapter_that_is_not_finite_is_never_saved(make_config, batches, caplog):
    config = make_config(max_train_steps=9, checkpointing_steps=1, max_skipped_steps=3)
    batches.at = {3: nan_weight}
    with (
        pytest.raises(DivergenceError, match="the last good checkpoint is of step 2"),
        caplog.at_level(logging.WARNING),
    ):
        list(stages.train(config))
    assert "is not finite, so step 3 was not saved" in caplog.text
    assert "the one of step 2 is kept" in caplog.text
    assert sorted(path.name for path in (config.paths.output_dir / "checkpoints").iterdir()) == [
        "step-000000001",
        "step-000000002",
    ]
    assert not (config.paths.output_dir / lora.WEIGHTS_NAME).exists()
    assert_finite_on_disk(config.paths.output_dir)


@pytest.mark.parametrize("kind", ["adapter", "average"])
def test_a_checkpoint_refuses_what_is_not_finite_and_writes_nothing(tmp_path, kind):
    state = state_at(1)
    state[kind]["up.weight"][0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"up\.weight is not finite"):
        write_checkpoint(tmp_path, state, ABOUT, metrics_at(1))
    assert not list(tmp_path.iterdir())
