"""fp16 as on a T4: its losses, its loss scale, and the same bytes when a run goes on."""

import pytest
import torch

from lora_utils import stages
from lora_utils.storage.log import WEIGHTS_NAME, read_summary
from lora_utils.training import loop, state
from lora_utils.training.loop import DivergenceError

GOES_ON = {
    "adamw": {},
    "dropout, recomputed": {"lora_dropout": 0.1, "gradient_checkpointing": "full"},
    "adafactor": {"optimizer": "adafactor"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedulefree": {"optimizer": "schedulefree"},
    "average": {"use_ema": True},
    "held-out loss": {"validation_split": 0.1, "validation_steps": 4},
}


def test_losses_are_those_of_fp32(on_card, tmp_path):
    half = [report.loss for report in stages.train(on_card())]
    full = on_card(mixed_precision="fp32", output_dir=tmp_path / "fp32")
    assert half == pytest.approx([report.loss for report in stages.train(full)], rel=1e-2)


@pytest.mark.parametrize("name", GOES_ON)
def test_a_run_that_goes_on_ends_in_the_same_bytes(name, on_card, tmp_path):
    straight = on_card(max_train_steps=3, output_dir=tmp_path / "straight", **GOES_ON[name])
    list(stages.train(straight))
    cut = {"resume_from_checkpoint": "latest", "output_dir": tmp_path / "cut", **GOES_ON[name]}
    list(stages.train(on_card(max_train_steps=1, **cut)))
    list(stages.train(on_card(max_train_steps=3, **cut)))
    ends = [tmp_path / folder / WEIGHTS_NAME for folder in ("straight", "cut")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.fixture
def scaled(monkeypatch):
    """Runs begin with another loss scale."""

    def scaled(scale):
        scaler = torch.amp.GradScaler
        monkeypatch.setattr(
            state.torch.amp, "GradScaler", lambda device, enabled: scaler(device, scale, enabled=enabled)
        )

    return scaled


def test_a_scale_that_is_far_too_high_comes_down_and_training_begins(on_card, scaled):
    scaled(2.0**33)
    reports = list(stages.train(on_card(max_train_steps=24, gradient_accumulation_steps=1)))
    skipped = [report.grad_norm is None for report in reports]
    assert all(skipped[:8])
    assert not any(skipped[-4:])


def test_a_scale_that_never_comes_down_ends_the_run(on_card, scaled):
    scaled(2.0**100)
    with pytest.raises(DivergenceError, match="20 steps"):
        list(stages.train(on_card(max_train_steps=24, gradient_accumulation_steps=1)))


def test_a_loss_that_is_not_finite_is_named_and_one_gradient_that_overflows_is_not(
    on_card, monkeypatch, caplog
):
    real = loop.batch_loss

    def first_is_nan(run, batch, visit):
        return real(run, batch, visit) * (1 if visit else torch.nan)

    monkeypatch.setattr(loop, "batch_loss", first_is_nan)
    config = on_card(gradient_accumulation_steps=1)
    list(stages.train(config))
    assert caplog.text.count("its loss is not finite") == 1
    summary = read_summary(config.paths.run_folder)
    assert (summary["skipped_steps"], summary["non_finite_losses"]) == (1, 1)
    caplog.clear()

    def overflowing(state, loss, real=state.TrainingState.backward):
        real(state, loss * (torch.inf if state.step == 0 else 1))

    monkeypatch.setattr(loop, "batch_loss", real)
    monkeypatch.setattr(state.TrainingState, "backward", overflowing)
    reports = list(stages.train(on_card(gradient_accumulation_steps=1, resume_from_checkpoint="none")))
    assert reports[0].grad_norm is None
    assert "not finite" not in caplog.text
    summary = read_summary(config.paths.run_folder)
    assert (summary["skipped_steps"], summary["non_finite_losses"]) == (1, 0)
