"""torch's operators as a simulation sees them: which ones compute, how much, and what they make."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")
GEMM, CONV, ATTENTION, OTHER = "gemm", "conv", "attention", "other"
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
}  # name to place of left factor
_FREE = ("_unsafe_view", "empty", "new_empty", "zeros", "new_zeros")  # zeroing is a memset


@dataclass(frozen=True)
class Work:
    """What some operators ask of a card."""

    kernels: int
    """Operators that compute, not those that make a view or a tensor without values; a node counts what it calls."""
    flops: dict[str, float]
    """gemm, conv and attention, two per multiplication; flash attention's backward is 2.5 times its forward."""
    streamed_bytes: int
    """Read and written by all operators."""

    @property
    def tflop(self) -> float:
        return sum(self.flops.values()) / 1e12


@cache
def kind_of(func: Any) -> str | None:
    """gemm, conv, attention or other; None of what makes a view, or a tensor without values."""
    name = _name(func)
    if name in _PRODUCTS:
        return GEMM
    if name.startswith("convolution"):
        return CONV
    if name.startswith(FLASH):
        return ATTENTION
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    return None if is_view or name.startswith(_FREE) else OTHER


@cache
def _name(func: Any) -> str:
    return func._schema.name.partition("::")[2]


def flops_of(func: Any, kind: str, args: tuple, outputs: Iterable) -> float:
    """Floating-point operations, two per multiplication; flash attention's backward is 2.5 times its forward."""
    name = _name(func)
    if kind == GEMM:
        left, right = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        return 2.0 * left.numel() * right.shape[-1]
    if kind == CONV:
        grad_or_out = next(iter(outputs)) if name == "convolution" else args[0]
        weight = args[1] if name == "convolution" else args[2]
        passes = 1 if name == "convolution" else sum(args[10][:2])
        return 2.0 * passes * grad_or_out.numel() * math.prod(weight.shape[1:])
    if kind == ATTENTION:
        backward = name.endswith("backward")
        query, key = args[1:3] if backward else args[:2]
        return 4.0 * query.numel() * key.shape[-2] * (2.5 if backward else 1)
    return 0.0


def form_of(func: Any, out: Any, args: tuple, kwargs: dict) -> Any:
    """How to make the same again: the name of the argument that is returned, or shapes; None where that is too much."""
    if func._schema.is_mutable:
        names = [name for name, value in kwargs.items() if value is out]
        return "" if args and out is args[0] else names[0] if names and out is not None else None
    outputs = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(one, Tensor) and one.device == META for one in outputs):
        return None
    return isinstance(out, tuple), *((one.shape, one.stride(), one.dtype) for one in outputs)


def shape_of(value: Any) -> Any:
    """What of an operator's arguments decides the form of its result; hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(shape_of, value))
    return value


def bytes_of(args: tuple, outputs: Iterable) -> int:
    """Read and written."""
    tensors = [
        *args,
        *outputs,
        *(tensor for some in args if isinstance(some, list | tuple) for tensor in some),
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
