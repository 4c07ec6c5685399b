"""What a training step and a sampling step of the U-Net need on a card: base, adapter, optimiser,
activations.

A step's own code runs on meta tensors: the same adapter, the same lean nodes, the same recomputation, on a
U-Net without numbers. Only bitsandbytes' linears need a stand-in.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from lora_utils.memory.footprint import Footprint, bytes_added_by, footprint_of
from lora_utils.memory.gradient_checkpointing import RECOMPUTABLE, apply_plan
from lora_utils.memory.operators import META, Work
from lora_utils.memory.simulation import Simulation, imitated_autocast, on_meta
from lora_utils.memory.step_shape import StepShape
from lora_utils.model import lean_ops
from lora_utils.model.lean import make_lean
from lora_utils.model.lora import add_lora
from lora_utils.model.quantisation import (
    NF4_BLOCK,
    can_hold,
    dequantised_weight,
    left_in_full,
    transformer_linears,
)
from lora_utils.system.device import DTYPES

WHOLE_STATES = {"adamw": 8, "paged_adamw": 8, "schedulefree": 8, "prodigy": 16}
"""Bytes per parameter, of optimisers whose states have its shape: two fp32 numbers, Prodigy's four."""
EIGHT_BIT = ("adamw8bit", "paged_adamw8bit")
EIGHT_BIT_FROM = 4096  # bitsandbytes keeps the states of smaller parameters in fp32
PAGED_FROM = 100_000  # and leaves the states of smaller parameters on the card
EIGHT_BIT_BLOCK = 256  # numbers that share a scale
EIGHT_BIT_MAPS = 2 * 256 * 4  # from 8 bits to fp32, one for each moment, shared by all parameters
NF4_SCALES = 256  # that share a scale of their own, in fp32 (QLoRA, section 3)


def state_bytes(name: str, shapes: Iterable[tuple[int, ...]]) -> int:
    """Bytes of the optimiser's state on the device, once a step was taken.

    Args:
        name: A value of the setting ``optimizer``. Paged states are counted whole: they leave the GPU only
            when it is full. Prodigy's are an upper bound: of parameters that start as zeros it keeps a
            quarter less.
        shapes: Of the trainable parameters, fp32.
    """
    shapes = list(shapes)
    return sum(_parameter_state_bytes(name, shape) for shape in shapes) + _map_bytes(name, shapes)


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


def _map_bytes(name: str, shapes: list[tuple[int, ...]]) -> int:
    is_used = name in EIGHT_BIT and any(_size(shape) >= EIGHT_BIT_FROM for shape in shapes)
    return EIGHT_BIT_MAPS if is_used else 0


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def training_footprint(shape: StepShape) -> Footprint:
    """One micro-batch and one update of the adapter."""
    dtype = DTYPES[shape.precision]
    unet = _build_base(shape).train()
    in_full = left_in_full(unet, shape.base)
    add_lora(unet, shape.lora, seed=0)
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    simulation = Simulation(shape.workspace_bytes)
    resident = {}
    autocast = not shape.is_lean and shape.precision != "fp32"
    with simulation, imitated_autocast(dtype) if autocast else nullcontext({}) as casts:
        # In the order of a real run: base, adapter, its compute copies; then the optimiser's states, which
        # the first update makes, and with which every later step has to fit.
        resident["base"] = bytes_added_by(simulation, lambda: _hold_base(simulation, unet, shape.base))
        resident["adapter"] = bytes_added_by(simulation, lambda: simulation.hold(learning))
        if shape.is_lean:
            resident["adapter"] += bytes_added_by(simulation, lambda: make_lean(unet))
        states = []  # named, so that they live to the end
        resident["optimizer"] = bytes_added_by(simulation, lambda: states.extend(_states(shape, learning)))
        if shape.accumulates:
            for parameter in learning:
                parameter.grad = torch.empty_like(parameter)

        apply_plan(unet, shape.plan)
        latents, conditioning = _inputs(shape, dtype)
        states += _uploads(latents, conditioning)
        if shape.plan.label == "none":  # what a module keeps is seen only where nothing is recomputed already
            for name, module in unet.named_modules():
                if type(module).__name__ in RECOMPUTABLE:
                    simulation.watch(name, module)

        first = simulation.operators
        simulation.start("forward")
        prediction = unet(latents.to(dtype), return_dict=False, **conditioning)[0]
        casts.clear()  # as the real autocast forgets them at its end
        loss = functional.mse_loss(prediction.float(), latents)
        del prediction
        class_names = {name: type(module).__name__ for name, module in unet.named_modules()}
        units = {name: (class_names[name], unit) for name, unit in simulation.units().items()}

        middle = simulation.operators
        simulation.start("backward")
        loss.backward()
        casts.clear()  # recomputation casts once more
        resident["gradients"] = sum(4 * parameter.numel() for parameter in learning)
    return replace(footprint_of(simulation, resident, unet, first, middle, units), left_in_full=in_full)


def sampling_footprint(shape: StepShape, batch: int, training: Footprint) -> Footprint:
    """One denoising step; batch is 2 for one image with guidance. The adapter's own activations are left out.

    Without gradients nothing outlives its layer, so the simulated U-Net has one transformer block everywhere.

    Args:
        shape: The training step's, with the picture's size.
        batch: Latents at a time.
        training: The training step's footprint, whose weights and forward pass are taken over.
    """
    dtype = DTYPES[shape.precision]
    unet = _build_base(replace(shape, unet=shape.unet | {"transformer_layers_per_block": 1}))
    simulation = Simulation()
    with simulation, torch.no_grad():
        base = bytes_added_by(simulation, lambda: _hold_base(simulation, unet, shape.base))
        latents, conditioning = _inputs(shape, dtype, batch)
        simulation.start("forward")
        unet(latents.to(dtype), return_dict=False, **conditioning)
    shallow = footprint_of(simulation, {"base": base}, unet)

    # The blocks that were left out bring weights alone, and the adapter is in the base's dtype as pipelines
    # load it.
    adapter = training.trainable * dtype.itemsize
    deeper = training.resident_bytes["base"] - base + adapter
    times = batch / shape.batch
    flops = {operation: amount * times for operation, amount in training.forward.flops.items()}
    streamed_bytes = int(training.forward.streamed_bytes * times)
    return replace(
        shallow,
        peak_bytes=shallow.peak_bytes + deeper,
        reserved_bytes=shallow.reserved_bytes + deeper,
        needed_bytes=shallow.needed_bytes + deeper,
        resident_bytes={"base": training.resident_bytes["base"], "adapter": adapter},
        work=Work(training.forward.kernels, flops, streamed_bytes),
    )


class Linear8bitLt(nn.Linear):
    """Stands for bitsandbytes' linears, which do not run on meta: unpacked anew wherever it is used."""

    def forward(self, input: Tensor) -> Tensor:
        return lean_ops.frozen_linear(input, partial(dequantised_weight, self), self.bias)


def _build_base(shape: StepShape) -> UNet2DConditionModel:
    """The U-Net on meta, frozen; its transformers' linears stand for quantised ones where they are to be."""
    dtype = DTYPES[shape.precision]
    with on_meta(dtype):
        unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(shape.unet)).requires_grad_(False)
    if shape.base == "plain":
        return unet
    for module in transformer_linears(unet).values():
        if can_hold(shape.base, module):
            codes = torch.empty(module.weight.shape, dtype=torch.int8, device=META)
            module.__class__ = Linear8bitLt
            module.weight = nn.Parameter(codes, requires_grad=False)
            # Where dequantised_weight looks for the scales and the dtype.
            vars(module.weight)["SCB"] = torch.empty(module.out_features, device=META)
            vars(module)["compute_dtype"] = dtype
    return unet


def _hold_base(simulation: Simulation, unet: nn.Module, base: str) -> None:
    """Count the frozen weights; codes of int8 stand for nf4's, half as large and with other scales."""
    for module in unet.modules():
        if isinstance(module, Linear8bitLt):  # before its parameters are met below: a storage counts once
            simulation.hold([module.weight], 0.5 if base == "nf4" else 1.0)
            simulation.hold([vars(module.weight)["SCB"]], 0.0 if base == "nf4" else 1.0)
            if base == "nf4":
                vars(module)["tables"] = _nf4_tables(module.weight.numel())
                simulation.hold(vars(module)["tables"])
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        simulation.hold(tensor for tensor in own if not tensor.requires_grad)


def _nf4_tables(numbers: int) -> list[Tensor]:
    """What bitsandbytes keeps of a linear beside its codes: scales, their scales, what codes stand for."""
    blocks = math.ceil(numbers / NF4_BLOCK)
    scales = torch.empty(blocks, dtype=torch.uint8, device=META)
    offset = torch.empty((), device=META)
    lengths = (math.ceil(blocks / NF4_SCALES), 256, 16)
    return [scales, offset, *(torch.empty(length, device=META) for length in lengths)]


def _states(shape: StepShape, learning: list[nn.Parameter]) -> list[Tensor]:
    """The optimiser's, and the average; what is paged is in host memory as long as the card is full."""
    is_paging = "paged" in shape.optimizer
    kept = [tuple(each.shape) for each in learning if not is_paging or each.numel() < PAGED_FROM]
    states = []
    for parameter_shape in kept:
        size = _parameter_state_bytes(shape.optimizer, parameter_shape)
        for half in (size // 2, size // 2):  # two moments, two tensors: the allocator rounds each
            states.append(torch.empty(half, dtype=torch.uint8, device=META))
    if shape.optimizer == "adamw":  # the fused one counts its steps on the card
        states += [torch.empty((), device=META) for _ in kept]
    states.append(torch.empty(_map_bytes(shape.optimizer, kept), dtype=torch.uint8, device=META))
    if shape.has_average:
        states += [torch.empty_like(parameter) for parameter in learning]
    return states


def _uploads(latents: Tensor, conditioning: dict[str, Any]) -> list[Tensor]:
    """What a batch has besides the U-Net's arguments, and the next batch, which is there already."""
    noise = [torch.empty_like(latents), torch.empty_like(latents)]  # of the target and of the input
    mask = torch.empty_like(latents[:, :1].contiguous())
    added = conditioning["added_cond_kwargs"]
    arguments = [latents, conditioning["timestep"], conditioning["encoder_hidden_states"], *added.values()]
    return [*noise, mask, *(torch.empty_like(tensor) for tensor in (*noise, mask, *arguments))]


def _inputs(shape: StepShape, dtype: torch.dtype, batch: int | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Latents, (B, C, h, w), fp32, and the U-Net's other arguments by name."""
    batch = batch or shape.batch
    config = shape.unet
    width, height = (side // shape.scale_factor for side in shape.size_px)
    time_width = 6 * config["addition_time_embed_dim"]  # of the six time_ids, each embedded
    pooled_width = config["projection_class_embeddings_input_dim"] - time_width
    computed = {"dtype": dtype, "device": META}
    added = {
        "text_embeds": torch.empty(batch, pooled_width, **computed),
        "time_ids": torch.empty(batch, 6, device=META),
    }
    conditioning = {
        "timestep": torch.zeros(batch, dtype=torch.long, device=META),
        "encoder_hidden_states": torch.empty(batch, shape.tokens, config["cross_attention_dim"], **computed),
        "added_cond_kwargs": added,
    }
    return torch.empty(batch, config["in_channels"], height, width, device=META), conditioning
