"""Autograd nodes that keep no more than their backward pass needs, where the base model is frozen.

Shapes: N rows (tokens of all examples), I inputs, O outputs, r rank, n linears that share an input; B batch,
C channels, h and w height and width. All tensors of one call have one dtype, the compute dtype; the adapters'
fp32 masters get their gradients through autograd's own cast.

In comments, dY stands for the gradient of the loss with respect to Y, of Y's shape.
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
    """Gives the base weights one below the other, (O, I); dequantised anew on each call if quantised."""
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
        masters: The parameters that get the gradients, A_1 .. A_n, B_1 .. B_n, fp32; of the copies' values.

    Returns:
        (..., O), the n outputs side by side.
    """
    return _LoraLinear.apply(x, dropped, projection, *masters)


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, projection: Projection, *masters: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # X, (N, I)
        seen = rows if dropped is None else dropped.reshape(rows.shape)  # X', what the adapters see

        # Y = X W^T + b
        weight = projection.weight().t()
        out = rows.mm(weight) if projection.bias is None else torch.addmm(projection.bias, rows, weight)

        # H = scale X' A^T, (N, n r): all n adapters in one product, for they share the input. Scaled while it
        # is narrow, and so that backward finds the scale in what it kept.
        low = seen.mm(projection.down.t())
        if projection.scale != 1:
            low.mul_(projection.scale)

        # Y_i += H_i B_i^T, written straight into each linear's part of Y
        projection.apart(out).baddbmm_(projection.apart(low), projection.up.mT)

        # X' itself, not its reshaped copy: another layer keeps the same storage, and it counts once.
        ctx.save_for_backward(x if dropped is None else dropped, low)
        ctx.projection = projection
        ctx.dropout = dropped is not None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, low = ctx.saved_tensors
        projection = ctx.projection
        rows = seen.reshape(-1, seen.shape[-1])  # X', (N, I)
        grad_rows = grad.reshape(-1, grad.shape[-1])  # dY, (N, O)
        grad_parts = projection.apart(grad_rows)  # dY_i, (n, N, O / n)

        # dH_i = dY_i B_i, without the scale as yet
        grad_low = torch.empty_like(low)
        torch.bmm(grad_parts, projection.up, out=projection.apart(grad_low))

        # dB_i = dY_i^T H_i, in which the scale is already
        grad_ups = grad_parts.mT.bmm(projection.apart(low))

        # d(X' A^T) = scale dH
        if projection.scale != 1:
            grad_low.mul_(projection.scale)

        # dX = dY W, and without dropout, where X' is X, + scale dH A. The text's projections need none of it.
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_rows.mm(projection.weight())
            grad_x = grad_x if ctx.dropout else grad_x.addmm_(grad_low, projection.down)
            grad_x = grad_x.view(seen.shape)

        # With dropout, dX' = scale dH A goes back through the dropout's own node.
        grad_dropped = None
        if ctx.needs_input_grad[1]:
            grad_dropped = grad_low.mm(projection.down).view(seen.shape)

        # dA = scale dH^T X', of all n at once
        grad_downs = grad_low.t().mm(rows).chunk(len(grad_ups))
        return grad_x, grad_dropped, None, *grad_downs, *grad_ups


def frozen_linear(x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """Compute x W^T + b, keeping nothing: backward unpacks the weights once more. (..., I) to (..., O)."""
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # how to get it, not the matrix: that would live until backward
        return F.linear(x, weight(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.matmul(ctx.weight()), None, None  # dX = dY W


def frozen_conv2d(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
    """A convolution with frozen weights; autograd's own keeps x, of which only the shape is needed.

    (B, C, h, w) to (B, C', h', w').
    """
    return _FrozenConv2d.apply(x, conv)


class _FrozenConv2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
        ctx.shape = x.shape
        ctx.conv = conv
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        conv = ctx.conv
        # Not transposed, no output padding; of input, weight and bias, the input's gradient alone.
        form = (conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, [True, False, False])
        # dX depends on dY and W; of X the operator asks the shape, so that one number, expanded, stands for
        # it.
        only_shape = grad.new_empty(1).expand(ctx.shape)
        return torch.ops.aten.convolution_backward(grad, only_shape, conv.weight, None, *form)[0], None


def geglu(hidden: Tensor) -> Tensor:
    """h_1 gelu(h_2) of the input's halves (Shazeer, 2020), keeping that alone; (..., 2 I) to (..., I)."""
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
        # Both halves are written into one tensor: concatenating them would take it twice.
        grad_hidden = torch.empty_like(hidden)
        grad_value, grad_gate = grad_hidden.chunk(2, dim=-1)

        # dh_1 = dY gelu(h_2), the activation once more instead of kept
        torch.mul(grad, F.gelu(gate), out=grad_value)

        # dh_2 = dY h_1 gelu'(h_2)
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
        x, mean, rstd = ctx.saved_tensors
        norm = ctx.norm
        sizes = _sizes(x, norm)

        # z = norm(x) once more: silu's derivative is a function of its input, which was overwritten.
        normed = torch.native_group_norm(x, norm.weight, norm.bias, *sizes, norm.eps)[0]

        # dz = dY silu'(z), under dY's name so that dY itself can be freed
        grad = torch.ops.aten.silu_backward(grad.contiguous(), normed)

        # dx by the statistics that were kept; weight and bias are frozen
        only_x = [True, False, False]
        grad_x, _, _ = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, norm.weight, *sizes, only_x
        )
        return grad_x, None


def _sizes(x: Tensor, norm: torch.nn.GroupNorm) -> tuple[int, int, int, int]:
    """Batch, channels, pixels and groups, as the kernels take them."""
    batch, channels = x.shape[:2]
    return batch, channels, x[0, 0].numel(), norm.num_groups
