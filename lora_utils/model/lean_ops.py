"""Autograd nodes that keep no more than their backward pass needs, where the base model is frozen.

Shapes: N rows (tokens of all examples), I inputs, O outputs, r rank, n linears that share an input; B batch, C
channels, h and w height and width. All tensors of one call have one dtype, the compute dtype; the adapters' fp32
masters get their gradients through autograd's own cast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Projection:
    """n linears on one input: a frozen base and, for each of them, a LoRA (Hu et al., 2021, eq. 3)."""

    weight: Callable[[], Tensor]
    """Gives the base weights one below the other, (O, I); dequantised anew on each call where they are quantised."""
    bias: Tensor | None
    """(O,)."""
    down: Tensor
    """Compute copies of the A matrices one below the other, (n r, I)."""
    up: Tensor
    """Compute copies of the B matrices, (n, O / n, r)."""
    scale: float
    """lora_alpha / rank."""

    def apart(self, rows: Tensor) -> Tensor:
        """(N, n k), what the linears have side by side, as a view (n, N, k)."""
        return rows.view(len(rows), len(self.up), -1).transpose(0, 1)


def lora_linear(
    x: Tensor, dropped: Tensor | None, projection: Projection, masters: Sequence[Tensor]
) -> Tensor:
    """Compute x W^T + b + scale (x A^T) B^T as one node; x and x A^T are all that is kept.

    Args:
        x: (..., I).
        dropped: What the adapters see instead of x, for LoRA dropout.
        projection: Base and compute copies of the adapters.
        masters: The parameters that get the gradients, A_1 .. A_n, B_1 .. B_n; their values must be the copies'.

    Returns:
        (..., O), the n outputs side by side.
    """
    return _LoraLinear.apply(x, dropped, projection, *masters)


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, projection: Projection, *masters: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight, seen = projection.weight().t(), rows if dropped is None else dropped.reshape(rows.shape)
        out = rows.mm(weight) if projection.bias is None else torch.addmm(projection.bias, rows, weight)
        low = seen.mm(projection.down.t())
        if projection.scale != 1:
            low.mul_(projection.scale)
        projection.apart(out).baddbmm_(projection.apart(low), projection.up.mT)
        ctx.save_for_backward(x if dropped is None else dropped, low)
        ctx.projection, ctx.dropout = projection, dropped is not None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seen, low), projection = ctx.saved_tensors, ctx.projection
        rows, grad_rows = seen.reshape(-1, seen.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_low, grad_parts = torch.empty_like(low), projection.apart(grad_rows)
        torch.bmm(grad_parts, projection.up, out=projection.apart(grad_low))
        grad_ups = grad_parts.mT.bmm(projection.apart(low))
        if projection.scale != 1:
            grad_low.mul_(projection.scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_rows.mm(projection.weight())
            grad_x = grad_x if ctx.dropout else grad_x.addmm_(grad_low, projection.down)
            grad_x = grad_x.view(seen.shape)
        if ctx.needs_input_grad[1]:
            grad_dropped = grad_low.mm(projection.down).view(seen.shape)
        grad_downs = grad_low.t().mm(rows).chunk(len(grad_ups))
        return grad_x, grad_dropped, None, *grad_downs, *grad_ups


def frozen_linear(x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """Compute x W^T + b, keeping nothing: backward dequantises the weights once more. (..., I) to (..., O)."""
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.matmul(ctx.weight()), None, None


def frozen_conv2d(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
    """A convolution with frozen weights; autograd's own keeps x, of which only the shape is needed.

    (B, C, h, w) to (B, C', h', w').
    """
    return _FrozenConv2d.apply(x, conv)


class _FrozenConv2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
        ctx.shape, ctx.conv = x.shape, conv
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        conv = ctx.conv
        form = (conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, [True, False, False])
        only_shape = grad.new_empty(1).expand(ctx.shape)
        return torch.ops.aten.convolution_backward(grad, only_shape, conv.weight, None, *form)[0], None


def geglu(hidden: Tensor) -> Tensor:
    """h_1 gelu(h_2) of both halves of the input (Shazeer, 2020), keeping the input alone; (..., 2 I) to (..., I)."""
    return _Geglu.apply(hidden)


class _Geglu(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        value, gate = hidden.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        value, gate = hidden.chunk(2, dim=-1)
        grad_hidden = torch.empty_like(hidden)
        grad_value, grad_gate = grad_hidden.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=grad_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return grad_hidden


def group_norm_silu(x: Tensor, norm: torch.nn.GroupNorm) -> Tensor:
    """silu(norm(x)) with frozen weights, keeping x and its statistics alone; (B, C, h, w) to the same."""
    return _GroupNormSilu.apply(x, norm)


class _GroupNormSilu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: torch.nn.GroupNorm) -> Tensor:
        x = x.contiguous()  # CUDA's kernel takes nothing else
        normed, mean, rstd = torch.native_group_norm(x, norm.weight, norm.bias, *_sizes(x, norm), norm.eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.norm = norm
        return F.silu(normed, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x, mean, rstd), norm = ctx.saved_tensors, ctx.norm
        normed = torch.native_group_norm(x, norm.weight, norm.bias, *_sizes(x, norm), norm.eps)[0]
        grad = torch.ops.aten.silu_backward(grad.contiguous(), normed)
        only_x = [True, False, False]
        sizes = _sizes(x, norm)
        return torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, norm.weight, *sizes, only_x)[
            0
        ], None


def _sizes(x: Tensor, norm: torch.nn.GroupNorm) -> tuple[int, int, int, int]:
    batch, channels = x.shape[:2]
    return batch, channels, x[0, 0].numel(), norm.num_groups
