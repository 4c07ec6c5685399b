"""An exponential moving average of the adapter: smoother weights than the last step's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of a model's trainable parameters, in their dtype, on their device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the parameters as they are.

        Args:
            model: Not wrapped for several processes, so that names stay what they are.
            decay: What the average keeps of itself in an update, once it is warm.
        """
        self._decay = decay
        self._parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._averages = {name: one.detach().clone() for name, one in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after a step, counted from 1.

        The first step is copied. Then the decay grows as (1 + s) / (10 + s), s the steps before this one, up to its
        limit: as diffusers' EMAModel, so that a short run does not average in where it started.
        """
        decay = min(self._decay, step / (9 + step)) if step > 1 else 0.0
        torch._foreach_lerp_(list(self._averages.values()), list(self._parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages as its weights, and afterwards, bit by bit, as it was. Nothing is copied."""
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
