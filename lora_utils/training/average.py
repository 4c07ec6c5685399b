"""Averages of the adapter: weights that are saved and measured, which need not be those that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class WeightAverage:
    """The average of a model's trainable parameters, in their dtype, on their device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the parameters as they are.

        Args:
            model: Not wrapped for several processes, so that names stay what they are.
            decay: What the average keeps of itself in an update, once it is warm.
        """
        self._decay = decay
        self._parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().clone() for name, weight in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after a step, counted from 1.

        The first step is copied. Then the decay grows as (1 + s) / (10 + s), s the steps before this one, up
        to its limit: as diffusers' EMAModel, so that a short run does not average in where it started.
        """
        # With s = step - 1 steps before this one, (1 + s) / (10 + s).
        decay = min(self._decay, step / (9 + step)) if step > 1 else 0.0
        # One kernel for all parameters instead of a thousand.
        torch._foreach_lerp_(list(self._averages.values()), list(self._parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages as its weights, and afterwards, bit by bit, as it was. No copies."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters; not copies."""
        return dict(self._averages)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take averages that ``state_dict`` gave, of a model of the same parameters."""
        for name, average in self._averages.items():
            average.copy_(state[name])

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._averages[name] = self._averages[name], parameter.data


@contextmanager
def averaged_weights(optimizer: Optimizer, average: WeightAverage | None) -> Iterator[None]:
    """The weights that are saved and measured; afterwards, bit by bit, those that are trained.

    Args:
        optimizer: From ``new_optimizer``, not the accelerator's wrapper; schedulefree keeps an average of its
            own.
        average: The EMA, if there is one.
    """
    if average is not None:
        with average.applied():
            yield
    # schedulefree trains one set of weights and is meant to be used with their running average.
    elif hasattr(optimizer, "eval"):
        with _schedulefree_average(optimizer):
            yield
    else:
        yield


@contextmanager
def _schedulefree_average(optimizer: Any) -> Iterator[None]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter.data for parameter in parameters]
    # eval works in place, and train rounds when it undoes that: measuring would change the weights.
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, data in zip(parameters, trained, strict=True):
            parameter.data = data
