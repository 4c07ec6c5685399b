"""torch's operators as a simulation sees them: which ones compute, how much, and what they make.

An operator comes as ``func`` with the arguments of its schema, as ``__torch_dispatch__`` gives them. *Work*
is the roofline model's word (Williams et al., 2009): operations, and bytes between the chip and its memory.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

META = torch.device("meta")
GEMM = "gemm"
CONV = "conv"
ATTENTION = "attention"
OTHER = "other"
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
# Of a matrix product, the index of its left factor among the arguments: addmm takes what is added first.
_LEFT_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
_FREE = ("_unsafe_view", "empty", "new_empty", "zeros", "new_zeros")  # zeroing is a memset
_BACKWARD_OF_FLASH = 2.5  # times the forward pass: five products instead of two, one of them a recomputation


@dataclass(frozen=True)
class Work:
    """What some operators ask of a card."""

    kernels: int
    """Operators that compute, not those that make a view or an empty tensor; a node counts what it calls."""
    flops: dict[str, float]
    """gemm, conv and attention, two per multiplication."""
    streamed_bytes: int
    """Read and written by all operators."""

    @property
    def tflop(self) -> float:
        return sum(self.flops.values()) / 1e12


NO_WORK = Work(0, {}, 0)


@cache
def class_of(func: Any) -> str | None:
    """gemm, conv, attention or other; None of what makes a view, or a tensor without values."""
    name = _name(func)
    if name in _LEFT_FACTOR:
        return GEMM
    if name.startswith("convolution"):
        return CONV
    if name.startswith(FLASH):
        return ATTENTION

    # A view's outputs alias an input that is not written to; an operator in place writes, and so computes.
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    return None if is_view or name.startswith(_FREE) else OTHER


@cache
def _name(func: Any) -> str:
    """Without aten:: and without the overload."""
    return func._schema.name.partition("::")[2]


def flops_of(func: Any, operator_class: str, args: tuple, outputs: Iterable) -> float:
    """Floating-point operations, two per multiplication."""
    name = _name(func)
    if operator_class == GEMM:
        index = _LEFT_FACTOR[name]
        left, right = args[index : index + 2]
        return 2.0 * left.numel() * right.shape[-1]
    if operator_class == CONV:
        # convolution(input, weight, ...), and convolution_backward(grad_output, input, weight, ...,
        # output_mask).
        is_forward = name == "convolution"
        grad_or_output = next(iter(outputs)) if is_forward else args[0]
        weight = args[1] if is_forward else args[2]
        passes = (
            1 if is_forward else sum(args[10][:2])
        )  # gradients of the input and of the weight that are wanted
        return 2.0 * passes * grad_or_output.numel() * math.prod(weight.shape[1:])
    if operator_class == ATTENTION:
        is_backward = name.endswith("backward")
        query, key = args[1:3] if is_backward else args[:2]  # backward takes the output's gradient first
        forward = 4.0 * query.numel() * key.shape[-2]  # q k^T, then the weights times v
        return forward * (_BACKWARD_OF_FLASH if is_backward else 1)
    return 0.0


class Convolution(NamedTuple):
    """A convolution by all that decides how a library computes it."""

    input: tuple[int, ...]
    """(B, C, h, w)."""
    weight: tuple[int, ...]
    """(O, C / groups, kh, kw)."""
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    is_backward: bool
    """The gradient of the input is computed, not the output."""


def convolution_of(func: Any, args: tuple) -> Convolution:
    """Of an operator of the class ``CONV``."""
    is_backward = _name(func) != "convolution"
    x, weight = args[1:3] if is_backward else args[:2]
    stride, padding, dilation, _, _, groups = args[4:10] if is_backward else args[3:9]
    shape = tuple(stride), tuple(padding), tuple(dilation), groups
    return Convolution(tuple(x.shape), tuple(weight.shape), *shape, is_backward)


def form_of(func: Any, out: Any, args: tuple, kwargs: dict) -> Any:
    """How to make the same again, without running the operator.

    Returns:
        Of an operator that writes to an argument, the argument's name, empty for the first one. Else whether
        the result is a tuple, and shape, strides and dtype of each tensor. None where that is too much to
        tell.
    """
    if func._schema.is_mutable:
        if args and out is args[0]:
            return ""
        names = [name for name, value in kwargs.items() if value is out]
        return names[0] if names and out is not None else None
    outputs = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(output, Tensor) and output.device == META for output in outputs):
        return None
    forms = ((output.shape, output.stride(), output.dtype) for output in outputs)
    return isinstance(out, tuple), *forms


def shape_of(value: Any) -> Any:
    """What of an operator's arguments decides the form of its result; hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(shape_of, value))
    return value


def bytes_of(args: tuple, outputs: Iterable) -> int:
    """Read and written."""
    values = [*args, *outputs]
    for argument in args:
        if isinstance(argument, list | tuple):  # as of cat and of the _foreach_ operators
            values += argument
    tensors = (value for value in values if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
