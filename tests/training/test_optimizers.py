"""Every optimiser by real steps, its groups and schedule against peft and diffusers."""

import math
import sys
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lora_utils import UserError
from lora_utils.config.training import LoraConfig, TrainConfig
from lora_utils.memory import unet_footprint
from lora_utils.model import lora
from lora_utils.training import optimizers
from lora_utils.training.average import WeightAverage, averaged_weights
from tests.conftest import TINY

RATES = {"prodigy": 1.0, "schedulefree": 0.01, "adafactor": 0.01}
NAMES = ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "adafactor", "prodigy", "schedulefree"]


class Toy(nn.Module):
    """Adapters alone, large enough for 8-bit states, that have to learn a target."""

    def __init__(self, device="cpu"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.ModuleDict(
            {"lora_A": nn.Linear(128, 64, bias=False), "lora_B": nn.Linear(64, 128, bias=False)}
        )
        self.lora_magnitude_vector = nn.Parameter(torch.ones(128))
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        self.register_buffer("data", torch.randn(2, 32, 128, generator=generator))
        self.to(device)

    def loss(self):
        inputs, target = self.data
        answer = self.layer["lora_B"](self.layer["lora_A"](inputs)) * self.lora_magnitude_vector
        return (answer - target).square().mean()

    def step(self, optimizer, micro_batches=1):
        for _ in range(micro_batches):
            self.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}


def config_of(name="adamw", **settings):
    return TrainConfig(**{"optimizer": name, "learning_rate": RATES.get(name, 0.003)} | settings)


def equal(weights, others):
    return all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_lowers_the_loss(name):
    toy = Toy()
    first = toy.loss().item()
    optimizer = optimizers.new_optimizer(toy, config_of(name))
    for _ in range(80 if name == "prodigy" else 40):  # Prodigy finds its rate first
        toy.step(optimizer)
    with averaged_weights(optimizer, None):
        assert toy.loss().item() < 0.7 * first


@pytest.mark.parametrize("name", NAMES)
def test_decay_reaches_every_optimiser_and_a_rate_of_zero_moves_nothing(name):
    toy = Toy()
    optimizer = optimizers.new_optimizer(toy, config_of(name, adam_weight_decay=0.5))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = toy.weights()
    toy.step(optimizer)
    assert equal(before, toy.weights())


def test_adamw_is_torchs_with_the_settings():
    mine, theirs = Toy(), Toy()
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.1, "adam_epsilon": 1e-3}
    first = optimizers.new_optimizer(mine, config_of(**settings))
    second = torch.optim.AdamW(theirs.parameters(), 0.003, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-3)
    for _ in range(5):
        mine.step(first)
        theirs.step(second)
    expected = theirs.weights()
    assert all(torch.allclose(tensor, expected[name]) for name, tensor in mine.weights().items())


def test_the_8_bit_flag_is_the_8_bit_optimiser():
    assert type(optimizers.new_optimizer(Toy(), config_of(use_8bit_adam=True))).__name__ == "AdamW8bit"


def test_paging_without_a_gpu_is_left_out_with_a_message(caplog):
    optimizer = optimizers.new_optimizer(Toy(), config_of("paged_adamw8bit"))
    assert type(optimizer).__name__ == "AdamW8bit"
    assert type(optimizers.new_optimizer(Toy(), config_of("paged_adamw"))) is torch.optim.AdamW
    assert "without a GPU it is the same without paging" in caplog.text


def test_states_that_were_loaded_are_paged_again(monkeypatch):
    """bitsandbytes' own loading makes plain tensors of them, which would stay on the card."""
    toy = Toy()
    optimizer = optimizers.new_optimizer(toy, config_of("adamw8bit"))
    toy.step(optimizer)
    saved = optimizer.state_dict()
    paged = []

    def buffer(parameter, dtype):
        paged.append(torch.zeros_like(parameter, dtype=dtype))
        return paged[-1]

    again = optimizers.new_optimizer(toy, config_of("adamw8bit"))
    monkeypatch.setattr(again, "is_paged", True)
    monkeypatch.setattr(again, "get_state_buffer", buffer)
    optimizers.load_states(again, saved)
    states = [each[name] for each in again.state.values() for name in ("state1", "state2")]
    assert [id(state) for state in states] == [id(each) for each in paged]
    kept = [each[name] for each in optimizer.state.values() for name in ("state1", "state2")]
    assert len(kept) == 6
    assert all(torch.equal(*pair) for pair in zip(states, kept, strict=True))


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_a_device_that_bitsandbytes_cannot_serve_gets_adamw_with_a_message(name, caplog):
    optimizer = optimizers.new_optimizer(Toy("meta"), config_of(name))
    assert type(optimizer) is torch.optim.AdamW
    assert f"optimizer {name} does not work on meta" in caplog.text
    assert "GiB more" in caplog.text


def test_without_bitsandbytes_adamw_takes_its_place_with_a_message(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # how Python blocks an import
    assert type(optimizers.new_optimizer(Toy(), config_of("adamw8bit"))) is torch.optim.AdamW
    assert "does not work on cpu (import of bitsandbytes.optim halted" in caplog.text


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")])
def test_what_is_not_installed_is_named_with_its_command(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        optimizers.new_optimizer(Toy(), config_of(name))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prodigy"])
def test_lora_plus_gives_b_alone_a_higher_rate(name):
    toy = Toy()
    optimizer = optimizers.new_optimizer(toy, config_of(name, loraplus_lr_ratio=16))
    first, second = optimizer.param_groups
    assert second["lr"] == 16 * first["lr"] == 16 * RATES.get(name, 0.003)
    assert [parameter is toy.layer["lora_B"].weight for parameter in second["params"]] == [True]
    assert len(first["params"]) == 2


def test_lora_plus_steps_as_pefts_own():
    both = []
    config = config_of(loraplus_lr_ratio=16, adam_weight_decay=0.1)
    pefts = {
        "optimizer_cls": torch.optim.AdamW,
        "lr": 0.003,
        "loraplus_lr_ratio": 16,
        "loraplus_weight_decay": 0.1,
    }
    for create in (
        partial(create_loraplus_optimizer, **pefts),
        partial(optimizers.new_optimizer, config=config),
    ):
        unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet")
        parameters = lora.add_lora(unet, LoraConfig(rank=2), seed=0)
        optimizer = create(unet)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        both.append(parameters)
    assert all(torch.allclose(theirs, mine) for theirs, mine in zip(*both, strict=True))


def rates(config, steps, accumulation=1):
    """Of each group at each update."""
    toy, seen = Toy(), []
    optimizer = optimizers.new_optimizer(toy, config)
    scheduler = optimizers.new_lr_scheduler(optimizer, config, steps)
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        toy.step(optimizer, accumulation)
        scheduler.step()
    return seen


CURVES = {
    "constant": (lambda place: 1.0, {}),
    "linear": (lambda place: 1 - place, {}),
    "cosine_with_restarts": (
        lambda place: (1 + math.cos(math.pi * (2 * place % 1))) / 2,
        {"lr_num_cycles": 2},
    ),
    "polynomial": (lambda place: (1 - place) ** 2 * (1 - 1e-7 / 0.01) + 1e-7 / 0.01, {"lr_power": 2.0}),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", CURVES)
def test_warm_up_and_decay_count_updates_whatever_is_accumulated(name, accumulation):
    curve, settings = CURVES[name]
    config = config_of(learning_rate=0.01, lr_scheduler=name, lr_warmup_steps=2, **settings)
    expected = [0.0, 0.005, *(0.01 * curve(update / 8) for update in range(8))]
    assert [one for (one,) in rates(config, 10, accumulation)] == pytest.approx(expected)


def test_lora_plus_keeps_its_ratio_through_the_schedule():
    config = config_of(learning_rate=0.01, lr_scheduler="polynomial", lr_warmup_steps=2, loraplus_lr_ratio=4)
    assert all(second == pytest.approx(4 * first) for first, second in rates(config, 6))


@pytest.mark.parametrize("settings", [{"learning_rate": 0}, {"lr_warmup_steps": 5}])
def test_a_polynomial_that_cannot_be_drawn_is_refused(settings):
    config = config_of(lr_scheduler="polynomial", **settings)
    with pytest.raises(UserError, match="lr_scheduler=linear"):
        optimizers.new_lr_scheduler(optimizers.new_optimizer(Toy(), config), config, 5)


@pytest.mark.parametrize("kind", ["ema", "schedulefree", "neither"])
def test_averages_are_swapped_in_and_out_bit_by_bit_and_training_goes_on_as_if_not(kind):
    def train(look):
        toy = Toy()
        optimizer = optimizers.new_optimizer(
            toy, config_of("schedulefree" if kind == "schedulefree" else "adamw")
        )
        average = WeightAverage(toy, 0.9) if kind == "ema" else None
        for step in range(1, 5):
            toy.step(optimizer)
            trained = toy.weights()
            if average:
                average.update(step)
            if look:
                with averaged_weights(optimizer, average):
                    assert equal(trained, toy.weights()) == (kind == "neither" or step == 1)
            assert equal(trained, toy.weights())
        return trained

    assert equal(train(look=True), train(look=False))


def test_schedulefree_shows_the_average_of_its_own():
    toy = Toy()
    optimizer = optimizers.new_optimizer(toy, config_of("schedulefree"))
    for _ in range(4):
        toy.step(optimizer)
    z, y = optimizer.state[toy.lora_magnitude_vector]["z"], toy.lora_magnitude_vector.detach().clone()
    with averaged_weights(optimizer, None):  # y = beta x + (1 - beta) z (Defazio et al., 2024, eq. 1)
        torch.testing.assert_close(0.9 * toy.lora_magnitude_vector + 0.1 * z, y)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "prodigy", "schedulefree"])
def test_the_bytes_of_the_state_are_those_of_a_real_one(name):
    shapes = [(64, 65), (64, 64), (8, 16), (12, 5, 3, 3), (100,)]
    model = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in shapes])
    optimizer = optimizers.new_optimizer(model, config_of(name))
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state for kept in optimizer.state.values() for key, state in kept.items() if key != "step"]
    storages = [state.untyped_storage() for state in states if torch.is_tensor(state)]
    real = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert unet_footprint.state_bytes(name, shapes) == real
    if name.startswith("adamw"):
        assert unet_footprint.state_bytes(f"paged_{name}", shapes) == real
