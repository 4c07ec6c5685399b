"""What ``torch.autocast`` on CUDA does to memory and time, on a device that has no autocast of its own.

Linears, convolutions and attention run in half precision, norms and losses in fp32; casts of fp32 leaves that learn
are kept until the end (torch's documentation of automatic mixed precision, CUDA op-specific behaviour).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LOW = ("linear", "conv2d", "scaled_dot_product_attention")
HIGH = ("group_norm", "layer_norm", "mse_loss", "softmax")


@contextmanager
def imitated_autocast(dtype: torch.dtype) -> Iterator[dict[int, Tensor]]:
    """Patch ``torch.nn.functional``: a TorchFunctionMode is not active where checkpointing recomputes.

    Yields the casts that are kept; clear them where the real context would end.
    """
    casts: dict[int, Tensor] = {}

    def lowered(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in casts:
            casts[id(value)] = value.to(dtype)
        return casts[id(value)]

    def raised(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == dtype else value

    originals = {name: getattr(functional, name) for name in LOW + HIGH}
    for name, original in originals.items():
        setattr(functional, name, _with_cast(original, lowered if name in LOW else raised))
    try:
        yield casts
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)


def _with_cast(original: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return original(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return call
