"""The nodes of the lean step on a card: linears against fp64, all others against torch's own operators."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.device import Settings
from benchmarks.gpu.smoke import Check
from lora_utils.model import lean_ops

SCALE = 0.5
LINEARS = 3  # on one input, as q, k and v
TOKENS = 4096
CHANNELS = 640
RANK = 32
PICTURE = (2, 320, 64, 64)
GROUPS = 32


def errors(check: Check, settings: Settings) -> dict[str, list[float]]:
    """Relative errors of what comes out and of every gradient, for each node, in fp32 and fp16."""
    draw = _Draw(settings)
    found = {}
    with _without_tf32():
        for dtype in (torch.float32, torch.float16):
            found[f"linear {dtype}"] = list(_linear(draw, dtype))
            for layout in (torch.contiguous_format, torch.channels_last):
                found[f"conv {dtype} {layout}"] = _convolution(draw, dtype, layout)
            found[f"norm {dtype}"] = _norm(draw, dtype)
            found[f"geglu {dtype}"] = _geglu(draw, dtype)
    return {node: [float(f"{error:.1e}") for error in its] for node, its in found.items()}


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Its ten bits would hide what is looked for; afterwards as before, for the trainings that follow."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, was_allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = was_allowed


class _Draw:
    """Random tensors on the device, equal ones on every device; a rehearsal's have an eighth of each side."""

    def __init__(self, settings: Settings) -> None:
        self.share = 8 if settings.rehearse else 1
        self._device = settings.device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)

    def picture(self) -> Tensor:
        batch, *sides = PICTURE
        return self(batch, *(side // self.share for side in sides))


def _linear(draw: _Draw, dtype: torch.dtype) -> Iterator[float]:
    """Of what comes out, of x, of all A and of all B."""
    width = CHANNELS // draw.share
    rank = RANK // draw.share
    x = draw(1, TOKENS // draw.share, width).to(dtype)
    weight = (draw(LINEARS * width, width) / width**0.5).to(dtype)
    downs = [draw(rank, width) / width**0.5 for _ in range(LINEARS)]
    ups = [draw(width, rank) / rank**0.5 for _ in range(LINEARS)]

    masters = [tensor.clone().requires_grad_() for tensor in (*downs, *ups)]
    copies = [tensor.to(dtype) for tensor in (*downs, *ups)]
    down = torch.cat(copies[:LINEARS])
    up = torch.stack(copies[LINEARS:])
    ours = x.clone().requires_grad_()
    out = lean_ops.lora_linear(
        ours, None, lean_ops.Projection(lambda: weight, None, down, up, SCALE), masters
    )
    grad = draw(*out.shape).to(dtype)
    out.backward(grad)

    exact = x.double().requires_grad_()
    leaves = [copy.double().requires_grad_() for copy in copies]
    updates = [(exact @ a.T) @ b.T for a, b in zip(leaves[:LINEARS], leaves[LINEARS:], strict=True)]
    expected = exact @ weight.double().T + SCALE * torch.cat(updates, -1)
    expected.backward(grad.double())

    yield _error(out, expected)
    yield _error(ours.grad, exact.grad)
    for part in (slice(0, LINEARS), slice(LINEARS, None)):
        pairs = zip(masters[part], leaves[part], strict=True)
        yield max(_error(master.grad, leaf.grad) for master, leaf in pairs)


def _convolution(draw: _Draw, dtype: torch.dtype, layout: torch.memory_format) -> list[float]:
    picture = draw.picture().to(dtype)
    channels = picture.shape[1]
    plain = nn.Conv2d(channels, channels, 3, padding=1).to(picture.device, dtype).requires_grad_(False)
    laid_out: Any = copy.deepcopy(plain)
    laid_out.to(memory_format=layout)
    return _against(lambda x: lean_ops.frozen_conv2d(x, laid_out), plain, picture)


def _norm(draw: _Draw, dtype: torch.dtype) -> list[float]:
    picture = draw.picture().to(dtype)
    norm = nn.GroupNorm(GROUPS // draw.share, picture.shape[1]).to(picture.device, dtype)
    norm.requires_grad_(False)
    return _against(lambda x: lean_ops.group_norm_silu(x, norm), lambda x: functional.silu(norm(x)), picture)


def _geglu(draw: _Draw, dtype: torch.dtype) -> list[float]:
    def plain(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * functional.gelu(gate)

    hidden = draw(1, TOKENS // draw.share, 2 * CHANNELS // draw.share).to(dtype)
    return _against(lean_ops.geglu, plain, hidden)


def _against(ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor) -> list[float]:
    """Errors of what comes out and of the gradient, which is that of half the square of what comes out."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0]), plain(inputs[1])]
    for out in outputs:
        out.backward(out.detach())
    return [_error(*outputs), _error(inputs[0].grad, inputs[1].grad)]


def _error(found: Any, expected: Any) -> float:
    """Norm of the difference, over the norm of what is expected."""
    found = found.detach().double()
    expected = expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
