"""What a training step and a sampling step of the U-Net need on a card: base, adapters, optimiser, activations."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from lora_utils.config.section import Size
from lora_utils.config.training import LoraConfig
from lora_utils.memory.footprint import Footprint, footprint_of, held_by
from lora_utils.memory.gradient_checkpointing import KINDS, Plan, apply_plan
from lora_utils.memory.operators import META, Work
from lora_utils.memory.simulation import Simulation, imitated_autocast, on_meta
from lora_utils.model import lean_ops
from lora_utils.model.lean import make_lean
from lora_utils.model.lora import add_lora
from lora_utils.model.quantisation import dequantised_weight
from lora_utils.system.device import DTYPES


WHOLE_STATES = {"adamw": 8, "paged_adamw": 8, "schedulefree": 8, "prodigy": 16}
"""Bytes per parameter, of optimisers whose states have its shape: two fp32 numbers, Prodigy's four."""
EIGHT_BIT = ("adamw8bit", "paged_adamw8bit")
EIGHT_BIT_FROM = 4096  # bitsandbytes keeps the states of smaller parameters in fp32
EIGHT_BIT_BLOCK = 256  # numbers that share a scale


def state_bytes(name: str, shapes: Iterable[tuple[int, ...]]) -> int:
    """Bytes of the optimiser's state on the device, once a step was taken.

    Args:
        name: A value of the setting ``optimizer``. Paged states are counted whole: they leave the GPU only when it
            is full. Prodigy's are an upper bound: of parameters that start as zeros it keeps a quarter less.
        shapes: Of the trainable parameters, fp32.
    """
    shapes = list(shapes)
    total = sum(_parameter_state_bytes(name, shape) for shape in shapes)
    if name in EIGHT_BIT and any(_size(shape) >= EIGHT_BIT_FROM for shape in shapes):
        total += 2 * 256 * 4  # the two maps from 8 bits to fp32, shared by all parameters
    return total


def _parameter_state_bytes(name: str, shape: tuple[int, ...]) -> int:
    size = _size(shape)
    if name == "adafactor":
        # A matrix's second moment is kept as its rows' and columns' means alone (Shazeer & Stern, 2018).
        factored = size // shape[-1] + size // shape[-2] if len(shape) > 1 else size
        return 4 * (factored + 1)  # and the root mean square
    if name in EIGHT_BIT:
        if size < EIGHT_BIT_FROM:
            return size * WHOLE_STATES["adamw"]
        return 2 * (size + 4 * -(-size // EIGHT_BIT_BLOCK))  # two moments: codes, and a scale for each block
    return size * WHOLE_STATES[name]


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


NF4_SHARE = (
    1 / 2 + 1 / 64 + 4 / 64 / 256
)  # of a byte: 4 bits, a scale of 8 bits for 64, one of 32 for 256 of those


@dataclass(frozen=True)
class StepShape:
    """All that decides what a micro-batch and its update need."""

    unet: dict[str, Any]
    """config.json."""
    lora: LoraConfig
    precision: str
    """Of the computation: fp32, fp16 or bf16."""
    base: Literal["plain", "int8", "nf4"]
    """How the transformers' frozen weights are kept."""
    optimizer: str
    batch: int
    size_px: Size
    """Width and height."""
    tokens: int
    is_lean: bool = True
    accumulates: bool = False
    """Gradients of earlier micro-batches are there."""
    has_average: bool = False
    """An EMA of the adapter."""
    scale_factor: int = 8
    """Pixels to a latent."""
    plan: Plan = field(default_factory=Plan)


def training_footprint(step: StepShape) -> Footprint:
    """One micro-batch and one update of the adapter."""
    dtype, held = DTYPES[step.precision], {}
    unet, simulation = _build_unet(step), Simulation()
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    autocast = not step.is_lean and step.precision != "fp32"
    with simulation, imitated_autocast(dtype) if autocast else nullcontext({}) as casts:
        held["base"] = held_by(simulation, lambda: _hold_base(simulation, unet, step.base))
        held["adapter"] = held_by(simulation, lambda: simulation.hold(learning))
        if step.is_lean:
            held["adapter"] += held_by(simulation, lambda: make_lean(unet))
        states = []
        held["optimizer"] = held_by(simulation, lambda: states.extend(_states(step, learning)))
        if step.accumulates:
            for parameter in learning:
                parameter.grad = torch.empty_like(parameter)
        apply_plan(unet, step.plan)
        latents, told = _inputs(step, dtype)
        if step.plan.label == "none":
            for name, module in unet.named_modules():
                if type(module).__name__ in KINDS:
                    simulation.watch(name, module)
        first = simulation.operators
        simulation.start("forward")
        prediction = unet(latents.to(dtype), return_dict=False, **told)[0]
        casts.clear()
        loss = functional.mse_loss(prediction.float(), latents)
        del prediction
        kinds = {name: type(module).__name__ for name, module in unet.named_modules()}
        units = {name: (kinds[name], unit) for name, unit in simulation.units().items()}
        middle = simulation.operators
        simulation.start("backward")
        loss.backward()
        casts.clear()
        held["gradients"] = sum(4 * parameter.numel() for parameter in learning)
        simulation.start("update")
        update = [
            torch.empty_like(parameter) for parameter in learning
        ]  # the root of the second moment, of all
        del update
    return footprint_of(simulation, held, unet, first, middle, units)


def sampling_footprint(step: StepShape, batch: int, training: Footprint) -> Footprint:
    """One denoising step; batch is 2 for one image with guidance. The adapter's own activations are left out.

    Without gradients nothing outlives its layer, so the simulated U-Net has one transformer block everywhere.

    Args:
        step: The training step's settings.
        batch: Latents at a time.
        training: The training step's footprint, whose weights and forward pass are taken over.
    """
    dtype, simulation, held = DTYPES[step.precision], Simulation(), {}
    unet = _build_base(replace(step, unet=step.unet | {"transformer_layers_per_block": 1}))
    with simulation, torch.no_grad():
        held["base"] = held_by(simulation, lambda: _hold_base(simulation, unet, step.base))
        latents, told = _inputs(step, dtype, batch)
        simulation.start("forward")
        unet(latents.to(dtype), return_dict=False, **told)
    shallow, times = footprint_of(simulation, held, unet), batch / step.batch
    deeper = training.held_bytes["base"] - held["base"] + training.trainable * dtype.itemsize
    forward = training.forward
    flops = {kind: amount * times for kind, amount in forward.flops.items()}
    return replace(
        shallow,
        peak_bytes=shallow.peak_bytes + deeper,
        reserved_bytes=shallow.reserved_bytes + deeper,
        needed_bytes=shallow.needed_bytes + deeper,
        held_bytes={"base": training.held_bytes["base"], "adapter": training.trainable * dtype.itemsize},
        work=Work(forward.kernels, flops, int(forward.streamed_bytes * times)),
    )


class Linear8bitLt(nn.Linear):
    """Stands for bitsandbytes' linears, which do not run on meta: unpacked anew wherever the weight is used."""

    def forward(self, input: Tensor) -> Tensor:
        return lean_ops.frozen_linear(input, partial(dequantised_weight, self), self.bias)


def _build_base(step: StepShape) -> UNet2DConditionModel:
    dtype = DTYPES[step.precision]
    with on_meta(dtype):
        unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(step.unet)).requires_grad_(False)
    if step.base != "plain":
        for name, module in unet.named_modules():
            if ".attentions." in name and type(module) is nn.Linear:
                codes = torch.empty(module.weight.shape, dtype=torch.int8, device=META)
                module.__class__ = Linear8bitLt
                module.weight = nn.Parameter(codes, requires_grad=False)
                vars(module.weight)["SCB"] = torch.empty(module.out_features, device=META)
                vars(module)["compute_dtype"] = dtype
    return unet


def _build_unet(step: StepShape) -> UNet2DConditionModel:
    unet = _build_base(step).train()
    add_lora(unet, step.lora, seed=0)
    return unet


def _hold_base(simulation: Simulation, unet: nn.Module, base: str) -> None:
    for module in unet.modules():
        if isinstance(module, Linear8bitLt):
            simulation.hold([module.weight], NF4_SHARE if base == "nf4" else 1.0)
            simulation.hold([vars(module.weight)["SCB"]], 0.0 if base == "nf4" else 1.0)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        simulation.hold(tensor for tensor in own if not tensor.requires_grad)


def _states(step: StepShape, learning: list[nn.Parameter]) -> list[Tensor]:
    """The optimiser's, and the average; paged ones are in host memory as long as the card is full."""
    name = step.optimizer
    sizes = [state_bytes(name, [tuple(one.shape)]) for one in learning] if "paged" not in name else []
    states = [
        torch.empty(half, dtype=torch.uint8, device=META) for size in sizes for half in (size // 2, size // 2)
    ]
    return states + [torch.empty_like(one) for one in learning if step.has_average]


def _inputs(step: StepShape, dtype: torch.dtype, batch: int | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Latents, fp32, and what else the U-Net is told."""
    batch, config = batch or step.batch, step.unet
    width, height = (side // step.scale_factor for side in step.size_px)
    time_width = 6 * config["addition_time_embed_dim"]
    pooled = config["projection_class_embeddings_input_dim"] - time_width
    half = {"dtype": dtype, "device": META}
    added = {
        "text_embeds": torch.empty(batch, pooled, **half),
        "time_ids": torch.empty(batch, 6, device=META),
    }
    told = {
        "timestep": torch.zeros(batch, dtype=torch.long, device=META),
        "encoder_hidden_states": torch.empty(batch, step.tokens, config["cross_attention_dim"], **half),
        "added_cond_kwargs": added,
    }
    return torch.empty(batch, config["in_channels"], height, width, device=META), told
