"""Every way of training, on the pretended card: no wrong device, dtype or generator, as much memory as was
forecast, and nothing left behind."""

import math

import pytest

from lora_utils import stages
from lora_utils.system.units import GIB
from lora_utils.training.validation import HeldOutLoss
from tests.pretended_card.conftest import LIBRARY_BYTES

QUANTISED = {"base_precision": "nf4"}
SETTINGS = {
    "plain": {},
    "held-out loss": {"validation_split": 0.1, "validation_steps": 3},
    "peft's way": {"lean_step": False},
    "all recomputed": {"gradient_checkpointing": "full"},
    "nothing recomputed": {"gradient_checkpointing": "none"},
    "attention and feed-forward": {"target_modules": "attn+ff"},
    "all layers": {"target_modules": "full"},
    "all layers, convolutions at a lower rank": {"target_modules": "full", "conv_rank": 2},
    "dropout": {"lora_dropout": 0.1},
    "dropout, recomputed": {"lora_dropout": 0.1, "gradient_checkpointing": "full"},
    "alpha": {"lora_alpha": 8},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, peft's way": {"use_dora": True, "lean_step": False},
    "batch of 2": {"train_batch_size": 2},
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "average": {"use_ema": True, "validation_split": 0.1, "validation_steps": 3},
    "min-SNR": {"snr_gamma": 5},
    "debiased": {"debiased_estimation_loss": True},
    "huber": {"loss_type": "huber"},
    "offset noise": {"noise_offset": 0.1, "input_perturbation": 0.1, "timestep_sampling": "logit_normal"},
    "caption dropout": {"caption_dropout_rate": 0.5},
    "adamw8bit": {"optimizer": "adamw8bit", "rank": 64},
    "adafactor": {"optimizer": "adafactor"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedulefree": {"optimizer": "schedulefree"},
    "lora+": {"loraplus_lr_ratio": 16},
    "nf4": QUANTISED,
    "nf4, all layers, recomputed": QUANTISED | {"target_modules": "full", "gradient_checkpointing": "full"},
    "nf4, dropout": QUANTISED | {"lora_dropout": 0.1},
    "nf4, peft's way": QUANTISED | {"lean_step": False},
    "int8": {"base_precision": "int8"},
    "int8, all layers": {"base_precision": "int8", "target_modules": "full"},
    "fp32": {"mixed_precision": "fp32"},
    "fp32, peft's way": {"mixed_precision": "fp32", "lean_step": False},
    "posterior mean": {"latent_mode": "mean"},
    "longer captions": {"max_token_length": 150},
    "random crops and mirror images": {"random_crop": True, "random_flip": True},
    "warm-up and cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
    "nf4, held-out loss": QUANTISED | {"validation_split": 0.1, "validation_steps": 3},
    "higher norm": {"max_grad_norm": 10.0},
    "other names of layers": {"target_modules": ["to_k", "to_v"]},
}
CLOSE = 0.02
"""Of the forecast, to what the allocator counts; most are within a thousandth."""


@pytest.fixture
def runs(monkeypatch):
    """Plan and forecast of each run."""
    known = []
    prepare = stages.prepare

    def prepared(*given):
        run = prepare(*given)
        known.append((run.planned.plan, run.planned.forecast))  # not the U-Net, which would stay
        return run

    monkeypatch.setattr(stages, "prepare", prepared)
    return known


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_goes_as_forecast_and_leaves_nothing(name, on_card, card, runs):
    assert card.allocated() <= LIBRARY_BYTES
    reports, peaks = [], []
    # The second step is the first whose peak has the optimiser's states; the last one measures beside it.
    steps = 3 if "validation_split" in SETTINGS[name] else 2
    for report in stages.train(on_card(max_train_steps=steps, **SETTINGS[name])):
        reports.append(report)
        peaks.append(card.peak())
    assert card.allocated() <= LIBRARY_BYTES
    assert len(reports) == steps
    assert all(math.isfinite(report.loss) for report in reports)
    ((plan, _),) = runs
    assert plan.predicted_bytes == pytest.approx(peaks[1], rel=CLOSE)


@pytest.mark.parametrize("name", ["held-out loss", "average", "nf4, held-out loss"])
def test_measuring_goes_as_forecast_too(name, on_card, card, runs, monkeypatch):
    peaks = []

    def measured(self, *given, real=HeldOutLoss.measure):
        card.reset_peak()
        loss = real(self, *given)
        peaks.append(card.peak())
        return loss

    monkeypatch.setattr(HeldOutLoss, "measure", measured)
    list(stages.train(on_card(max_train_steps=3, **SETTINGS[name])))
    ((_, forecast),) = runs
    expected = forecast.stages["held-out"].allocated_gib * GIB
    assert expected == pytest.approx(max(peaks), rel=CLOSE)


def test_there_are_enough_of_them():
    assert len(SETTINGS) >= 40
