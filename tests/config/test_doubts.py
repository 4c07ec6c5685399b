"""Settings that run and are most likely not meant are told, against what diffusers' schedules really do."""

import pytest
import torch

from lora_utils.config.doubts import doubts
from lora_utils.config.loading import ConfigError, load_config, presets
from lora_utils.training.optimizers import new_lr_scheduler
from tests.conftest import ROOT

QUIET = {"max_train_steps": 1000}
SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


def told(visits=None, processes=1, **settings):
    return doubts(load_config(None, settings), visits, processes)


def rates(train, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    scheduler = new_lr_scheduler(optimizer, train, steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_ready_made_settings_raise_no_doubt():
    assert len(presets()) >= 5
    for name in presets():
        config = load_config(ROOT / "lora_utils" / "presets" / f"{name}.yaml")
        assert [line for line in doubts(config, 10_000) if "checkpointing_steps" not in line] == []
    assert told(10_000) == []
    assert told(**QUIET) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "steps"), [(0, 1), (0, 8), (3, 8), (7, 8), (8, 8), (9, 8), (50, 12), (1, 1)]
)
def test_a_rate_that_never_gets_to_its_peak_is_told(schedule, warmup, steps):
    settings = {
        "lr_scheduler": schedule,
        "lr_warmup_steps": warmup,
        "checkpointing_steps": 1,
        "learning_rate": 0.01,
    }
    # By epochs too, which are counted with the data.
    ways = [
        ({"max_train_steps": steps}, None),
        ({"num_train_epochs": steps, "gradient_accumulation_steps": 1}, 1),
    ]
    for length, visits in ways:
        if schedule == "polynomial" and warmup >= steps:
            with pytest.raises(ConfigError, match="lr_scheduler polynomial needs"):
                told(visits, **settings, **length)
            continue
        lines = told(visits, **settings, **length)
        train = load_config(None, settings | length).train
        reached = max(rates(train, steps))
        assert bool(lines) == (reached < 0.01), (lines, reached)
        assert not lines or f"reaches {reached:.2g} of 0.01" in lines[0]


@pytest.mark.parametrize(
    ("cycles", "steps", "warmup", "is_told"),
    [(1, 8, 0, False), (8, 8, 0, False), (9, 8, 0, True), (8, 8, 1, True), (300, 12, 3, True)],
)
def test_more_cycles_than_steps_are_told(cycles, steps, warmup, is_told):
    settings = {"lr_num_cycles": cycles, "max_train_steps": steps, "lr_warmup_steps": warmup}
    lines = told(lr_scheduler="cosine_with_restarts", checkpointing_steps=1, **settings)
    assert ["lr_num_cycles" in line for line in lines] == ([True] if is_told else [])
    assert told(lr_scheduler="cosine", checkpointing_steps=1, **settings) == []


LEARN_NOTHING = [
    ({"learning_rate": 0}, "learning_rate is 0"),
    ({"learning_rate": 1e-9}, "next to nothing at learning_rate 1e-09"),
    ({"learning_rate": 1}, "diverges"),
    ({"learning_rate": 1, "optimizer": "adafactor"}, "diverges"),
    ({"optimizer": "prodigy"}, "prodigy learns next to nothing at learning_rate 0.0001; 1 is usual"),
    ({"optimizer": "prodigy", "learning_rate": 0.05}, "1 is usual"),
    ({"optimizer": "prodigy", "learning_rate": 50}, "diverges"),
    ({"optimizer": "schedulefree"}, "schedulefree learns next to nothing"),
    ({"optimizer": "schedulefree", "learning_rate": 1e-4}, "1e-3 is usual"),
    ({"optimizer": "schedulefree", "learning_rate": 0}, "learning_rate is 0"),
    ({"use_8bit_adam": True, "learning_rate": 1}, "diverges"),
    ({"lora_alpha": 1e-5}, "multiplies the update by 6e-07"),
    ({"conv_rank": 4, "target_modules": "attn"}, "conv_rank has no effect"),
    ({"lora_alpha": 0.01, "rank": 64}, "lora_alpha 0.01 at rank 64"),
    ({"lora_alpha": 0.001, "rank": 64, "use_rslora": True}, "multiplies the update by 0.0001"),
    ({"lora_dropout": 0.95}, "lora_dropout 0.95"),
    ({"caption_dropout_rate": 0.99}, "next to no captions"),
    ({"snr_gamma": 1e-4}, "snr_gamma 0.0001"),
    ({"max_grad_norm": 1e-6}, "max_grad_norm 1e-06"),
    ({"adam_weight_decay": 2000}, "takes 20% off"),
    ({"min_timestep": 999}, "one timestep of 1000, 999"),
    ({"min_timestep": 7, "max_timestep": 8}, "one timestep of 1000, 7"),
    ({"timestep_sampling": "logit_normal", "logit_mean": 30}, "the highest timestep alone"),
    ({"timestep_sampling": "logit_normal", "logit_mean": -11}, "the lowest timestep alone"),
    ({"num_train_epochs": 3}, "num_train_epochs 3 has no effect"),
]
LEARN_SOMETHING = [
    {"learning_rate": 6e-3}, {"learning_rate": 1e-6}, {"optimizer": "prodigy", "learning_rate": 1},
    {"optimizer": "prodigy", "learning_rate": 0.5}, {"optimizer": "schedulefree", "learning_rate": 1e-3},
    {"optimizer": "adafactor", "learning_rate": 1e-3}, {"lora_alpha": 1, "rank": 128}, {"lora_alpha": 0.5},
    {"conv_rank": 4, "target_modules": "full"}, {"conv_rank": 4, "target_modules": ["attn", "conv1"]},
    {"lora_alpha": 1, "rank": 256, "use_rslora": True}, {"caption_dropout_rate": 0.5}, {"snr_gamma": 1},
    {"max_grad_norm": 0.01}, {"max_timestep": 100}, {"logit_mean": 30},
    {"timestep_sampling": "logit_normal", "logit_mean": 2}, {"num_train_epochs": 100},
    {"lr_num_cycles": 5000}, {"validation_steps": 5000},
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), LEARN_NOTHING, ids=lambda value: str(value)[:60])
def test_what_learns_nothing_is_told_once(settings, words):
    lines = told(**QUIET | settings)
    assert len(lines) == 1
    assert words in lines[0]
    assert lines[0].isprintable()


@pytest.mark.parametrize("settings", LEARN_SOMETHING, ids=str)
def test_what_learns_something_is_left_alone(settings):
    assert told(**QUIET | settings) == []


@pytest.mark.parametrize(
    ("settings", "visits", "processes", "words"),
    [
        ({"train_batch_size": 8, "gradient_accumulation_steps": 1}, 3, 1, "8 visits and the data has 3"),
        ({"train_batch_size": 2}, 7, 1, "8 visits and the data has 7"),
        ({"gradient_accumulation_steps": 64}, 10, 1, "6.4 times in every step"),
        ({}, 7, 2, "8 visits and the data has 7"),
        ({}, 8, 2, None),
        ({"train_batch_size": 2}, 8, 1, None),
        ({"train_batch_size": 10**6}, None, 1, None),
    ],
)
def test_a_step_larger_than_the_data_is_told(settings, visits, processes, words):
    lines = told(visits, processes, **QUIET | settings)
    assert [words in line for line in lines] == ([True] if words else [])


@pytest.mark.parametrize(
    ("settings", "visits", "words"),
    [
        ({"num_train_epochs": 1, "checkpointing_steps": 3}, 10, ["3 steps end before checkpointing_steps 5"]),
        ({"max_train_steps": 4}, None, ["4 steps end before checkpointing_steps 5"]),
        ({"max_train_steps": 5}, None, []),
        ({"num_train_epochs": 2}, 10, []),
        ({"max_train_steps": 9, "validation_split": 0.2}, None, ["9 steps end before validation_steps 10"]),
        ({"max_train_steps": 10, "validation_split": 0.2}, None, []),
        ({"num_train_epochs": 1, "validation_split": 0.2}, 8, ["validation_steps", "checkpointing_steps"]),
        ({"num_train_epochs": 1}, None, []),
    ],
)
def test_runs_that_end_before_something_was_due_are_told(settings, visits, words):
    lines = told(
        visits, **{"checkpointing_steps": 5, "validation_steps": 10} | settings | {"checkpointing_steps": 5}
    )
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_steps_are_those_of_all_processes():
    assert "the 3 steps" in told(12, lr_warmup_steps=9, num_train_epochs=1, checkpointing_steps=1)[0]
    assert "the 1 steps" in told(12, 3, lr_warmup_steps=9, num_train_epochs=1, checkpointing_steps=1)[0]
