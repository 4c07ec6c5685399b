"""The graphs of others, rebuilt to be counted: one step of diffusers' script, sd-scripts and OneTrainer.

They are models: diffusers' modules with each one's adapter, autocast and checkpointing.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_utils.memory.allocator import replay
from lora_utils.memory.simulation import META, Simulation, imitated_autocast, on_meta
from lora_utils.model import architectures

ATTENTION = r"attn\d\.(to_q|to_k|to_v|to_out\.0)$"
ALL = ATTENTION + r"|ff\.net\.(0\.proj|2)$|proj_in$|proj_out$"
QUANTISED = r"\.attn|\.ff\.|proj_"
RESIDENT = {"vae": (83_653_863, torch.float32), "text encoders": (123_060_480 + 694_659_840, torch.float16)}


@dataclass(frozen=True)
class Graph:
    """One way to do one step on SDXL's U-Net."""

    lora: str = "plain"
    """plain, peft, or node: base and LoRA in one, from which the project's own step grew."""
    fused: bool = False
    """GEGLU and GroupNorm with SiLU recomputed inside their node."""
    autocast: bool = False
    recompute: str = ""
    """Nothing; full (diffusers' flag); reentrant (sd-scripts); else modules, by a regular expression."""
    base: str = "fp16"
    targets: str = ATTENTION
    rank: int = 32
    batch: int = 1
    side_px: int = 1024
    state_bytes: int = 8
    """Of the optimiser per trainable parameter; 2 with 8-bit Adam."""
    resident: bool = False
    """VAE and text encoders stay on the card."""


def count(graph: Graph) -> tuple[Simulation, int]:
    """Forward and backward, counted; and the bytes reserved."""
    unet = build(graph)
    simulation = Simulation()
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    cast = imitated_autocast(torch.float16) if graph.autocast else nullcontext({})
    with simulation, cast as casts:
        simulation.hold([*unet.parameters(), *unet.buffers()])
        states = [_state(parameter, graph.state_bytes) for parameter in learning]
        if graph.resident:
            states += [torch.empty(size, dtype=dtype, device=META) for size, dtype in RESIDENT.values()]
        latents, conditioning = inputs(graph)
        # A reentrant checkpoint gives gradients only where an input requires them.
        latents.requires_grad_(graph.recompute == "reentrant")
        simulation.start("forward")
        prediction = unet(latents, return_dict=False, **conditioning)[0]
        casts.clear()
        loss = F.mse_loss(prediction.float(), torch.empty(latents.shape, device=META))
        del prediction
        simulation.start("backward")
        loss.backward()
        casts.clear()
    return simulation, replay(simulation.trace)


def build(graph: Graph) -> UNet2DConditionModel:
    """The U-Net on meta, with adapters."""
    with on_meta(torch.float16):
        unet = UNet2DConditionModel(**architectures.UNET).requires_grad_(False).train()
        if graph.base != "fp16":
            _replace(unet, QUANTISED, lambda linear: QuantisedLinear(linear, graph.base))
        if graph.lora == "peft":
            names = [name for name, _ in unet.named_modules() if re.search(graph.targets, name)]
            unet.add_adapter(LoraConfig(r=graph.rank, lora_alpha=graph.rank, target_modules=names))
        else:
            adapter_class = {"plain": PlainLora, "node": NodeLora}[graph.lora]
            _replace(unet, graph.targets, lambda linear: adapter_class(linear, graph.rank))
    for parameter in unet.parameters():
        if parameter.requires_grad and graph.lora == "peft":
            parameter.data = parameter.data.float()
    if graph.fused:
        _fuse(unet)
    _recompute(unet, graph.recompute)
    return unet


def inputs(graph: Graph) -> tuple[Tensor, dict[str, Any]]:
    """Latents, and what else the U-Net is told."""
    batch = graph.batch
    side = graph.side_px // 8
    half = {"dtype": torch.float16, "device": META}
    embeds = torch.empty(batch, 77, 2048, **half)
    added = {"text_embeds": torch.empty(batch, 1280, **half), "time_ids": torch.empty(batch, 6, **half)}
    conditioning = {
        "timestep": torch.zeros(batch, device=META),
        "encoder_hidden_states": embeds,
        "added_cond_kwargs": added,
    }
    return torch.empty(batch, 4, side, side, **half), conditioning


class PlainLora(nn.Module):
    """Base and update as separate operators; masters are fp32."""

    def __init__(self, base: nn.Module, rank: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype))
        self.B = nn.Parameter(torch.empty(base.out_features, rank, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        update = F.linear(F.linear(x, self.A.to(x.dtype)), (self.B * 1.0).to(x.dtype))
        return out + update if isinstance(self.base, QuantisedLinear) else out.add_(update)


class NodeLora(PlainLora):
    """Base and update as one autograd node; A and B are kept in half precision beside their masters."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__(base, rank, torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        return _Node.apply(x, self.base.weight, self.base.bias, self.A, self.B)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat.mm(A.t())
        out = flat.mm(weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        out.addmm_(inner, B.t())
        ctx.save_for_backward(x, inner, weight, A, B)
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, A, B = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        flat_x = x.reshape(-1, x.shape[-1])
        grad_x = None
        grad_inner = flat.mm(B)
        if ctx.needs_input_grad[0]:
            grad_x = flat.mm(weight)
            grad_x = grad_x.addmm_(grad_inner, A).view(x.shape)
        return grad_x, None, None, grad_inner.t().mm(flat_x), flat.t().mm(inner)


class QuantisedLinear(nn.Module):
    """A frozen weight in int8 or nf4, unpacked while it is used: its memory, not its numbers."""

    def __init__(self, linear: nn.Linear, base: str) -> None:
        super().__init__()
        count = linear.weight.numel()
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.register_buffer(
            "packed", torch.empty(count if base == "int8" else count // 2, dtype=torch.uint8)
        )
        self.register_buffer(
            "scale", torch.empty(self.out_features * 2 if base == "int8" else count // 64).byte()
        )

    def forward(self, x: Tensor) -> Tensor:
        return _Unpacked.apply(x, self.packed, self.scale, self.bias, (self.out_features, self.in_features))


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, shape: Any
    ) -> Tensor:
        ctx.shape = shape
        return F.linear(x, torch.empty(shape, dtype=x.dtype, device=x.device), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            grad.matmul(torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device)),
            None,
            None,
            None,
            None,
        )


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        value, gate = both.chunk(2, -1)
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        out = torch.empty_like(both)
        value, gate = both.chunk(2, -1)
        grad_value, grad_gate = out.chunk(2, -1)
        torch.mul(grad, F.gelu(gate), out=grad_value)
        grad_gate.copy_(torch.ops.aten.gelu_backward(grad * value, gate))
        return out


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        ctx.shape = (x.shape[0], x.shape[1], x.numel() // (x.shape[0] * x.shape[1]), norm.num_groups)
        out, mean, rstd = torch.ops.aten.native_group_norm(x, norm.weight, norm.bias, *ctx.shape, norm.eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.norm = norm
        return F.silu(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, rstd = ctx.saved_tensors
        weight = ctx.norm.weight
        out = torch.ops.aten.native_group_norm(x, weight, ctx.norm.bias, *ctx.shape, ctx.norm.eps)[0]
        grad = torch.ops.aten.silu_backward(grad, out)
        del out
        only_x = [True, False, False]
        return torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, weight, *ctx.shape, only_x)[
            0
        ], None


def _fuse(unet: nn.Module) -> None:
    def resnet(block: Any, x: Tensor, temb: Tensor) -> Tensor:
        hidden = (
            block.conv1(_NormSilu.apply(x, block.norm1)) + block.time_emb_proj(F.silu(temb))[:, :, None, None]
        )
        hidden = block.conv2(_NormSilu.apply(hidden, block.norm2))
        return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + hidden

    for module in unet.modules():
        if isinstance(module, GEGLU):
            module.forward = lambda x, module=module: _Geglu.apply(module.proj(x))
        elif isinstance(module, ResnetBlock2D):
            module.forward = lambda x, temb, module=module: resnet(module, x, temb)


def _recompute(unet: UNet2DConditionModel, wanted: str) -> None:
    if wanted == "full":
        unet.enable_gradient_checkpointing()
    elif wanted == "reentrant":
        unet.enable_gradient_checkpointing(
            lambda module, *args: checkpoint(module, *args, use_reentrant=True)
        )
    elif wanted:
        for name, module in unet.named_modules():
            if re.fullmatch(wanted, name):
                module.forward = lambda *args, forward=module.forward, **kwargs: checkpoint(
                    forward, *args, use_reentrant=False, **kwargs
                )


def _replace(unet: nn.Module, pattern: str, build_one: Any) -> None:
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear | QuantisedLinear) and re.search(pattern, name):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, build_one(module))


def _state(parameter: Tensor, state_bytes: int) -> list[Tensor]:
    """The optimiser's states; and an fp32 master where the parameter itself is kept in half precision."""
    master = [torch.empty_like(parameter, dtype=torch.float32)] if parameter.dtype == torch.float16 else []
    half = parameter.numel() * state_bytes // 2
    return [*master, *(torch.empty(half, dtype=torch.uint8, device=META) for _ in range(2))]
