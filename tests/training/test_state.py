"""States of optimisers through tensors and JSON: exact, and refused where they are of other parameters."""

import json

import pytest
import torch

from lora_utils.storage.checkpoint import flatten_state, unflatten_state
from lora_utils.training import optimizers
from tests.training.test_optimizers import NAMES, Toy, config_of, equal


@pytest.mark.parametrize("name", NAMES)
def test_states_go_on_as_if_nothing_had_been(name):
    whole, resumed = Toy(), Toy()
    optimizer = optimizers.new_optimizer(whole, config_of(name))
    for _ in range(3):
        whole.step(optimizer)
    tensors, rest = flatten_state(optimizer.state_dict())
    copied = {key: tensor.clone() for key, tensor in tensors.items()}
    resumed.load_state_dict(whole.state_dict())
    other = optimizers.new_optimizer(resumed, config_of(name))
    optimizers.load_states(other, unflatten_state(copied, json.loads(json.dumps(rest))))
    for _ in range(3):
        whole.step(optimizer)
        resumed.step(other)
    assert equal(whole.weights(), resumed.weights())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_states_that_a_kernel_would_write_beyond_are_refused(name):
    toy = Toy()
    optimizer = optimizers.new_optimizer(toy, config_of(name))
    toy.step(optimizer)
    tensors, rest = flatten_state(optimizer.state_dict())
    large = [key for key, tensor in tensors.items() if tensor.numel() > 1]
    assert len(large) >= 6
    for key in large:
        forged = tensors | {key: tensors[key].flatten()[:1].clone()}
        with pytest.raises(ValueError, match=r"has the shape \(1,\)"):
            optimizers.load_states(
                optimizers.new_optimizer(Toy(), config_of(name)), unflatten_state(forged, rest)
            )


def test_the_rates_of_a_run_are_its_own_settings():
    toy = Toy()
    optimizer = optimizers.new_optimizer(toy, config_of("adamw"))
    toy.step(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"lr": 9.0, "fused": False, "differentiable": True}
    other = optimizers.new_optimizer(Toy(), config_of("adamw"))
    optimizers.load_states(other, saved)
    assert other.param_groups[0]["lr"] == config_of("adamw").learning_rate
    assert not other.param_groups[0]["differentiable"]
    assert torch.equal(*(one.state_dict()["state"][0]["exp_avg"] for one in (other, optimizer)))
