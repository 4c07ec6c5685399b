"""The moving average against diffusers' own."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from lora_utils.training.average import WeightAverage


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    return model


def wander(model):
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter += torch.randn_like(parameter)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_diffusers_average(model, decay):
    mine, theirs = WeightAverage(model, decay), EMAModel(model[1].parameters(), decay=decay)
    for step in range(1, 30):
        wander(model)
        mine.update(step)
        theirs.step(model[1].parameters())
        for average, expected in zip(mine.state_dict().values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(average, expected)


def test_only_what_is_trained_is_averaged(model):
    assert list(WeightAverage(model, 0.9).state_dict()) == ["1.weight", "1.bias"]


def test_weights_come_back_bit_by_bit(model):
    average = WeightAverage(model, 0.9)
    for step in (1, 2, 3):
        wander(model)
        average.update(step)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    with average.applied():
        for name, tensor in averages.items():
            assert torch.equal(model.state_dict()[name], tensor)
            assert not torch.equal(tensor, trained[name])
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, averages[name]) for name, tensor in average.state_dict().items())


def test_a_state_that_is_loaded_goes_on_as_it_would_have(model):
    first = WeightAverage(model, 0.9)
    wander(model)
    first.update(1)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = WeightAverage(model, 0.9)
    second.load_state_dict(state)
    wander(model)
    for average in (first, second):
        average.update(2)
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in second.state_dict().items())
