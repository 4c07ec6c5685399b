"""What a step keeps on the card."""

from typing import get_args

import pytest
from torch import nn

from lora_utils.config.training import Optimizer, TrainConfig
from lora_utils.memory.unet_footprint import state_bytes
from lora_utils.training.optimizers import new_optimizer


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimiser_has_a_size_and_a_constructor(name):
    """Sizes are compared with those of real states in tests/training."""
    large = (64, 64)
    small = (63, 64)
    assert state_bytes(name, [large, small]) > state_bytes(name, [large]) > 0
    assert new_optimizer(nn.Linear(64, 64), TrainConfig(optimizer=name)).param_groups


def test_an_optimiser_without_a_size_is_no_adamw():
    with pytest.raises(KeyError, match="lion"):
        state_bytes("lion", [(64, 64)])
