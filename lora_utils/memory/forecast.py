"""What each stage needs: its models' footprints on the card, seconds, host memory and files.

One function a stage; ``forecast`` puts them together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_utils.config.schema import RunConfig
from lora_utils.config.section import Size
from lora_utils.memory.cards import CONTEXT_GIB, FP32_SLOWDOWN, Card
from lora_utils.memory.footprint import (
    Footprint,
    cached_on_disk,
    captions_footprint,
    decoding_footprint,
    encoding_footprint,
)
from lora_utils.memory.gradient_checkpointing import Plan, Prices, choose
from lora_utils.memory.operators import Work
from lora_utils.memory.planning import plan_step, step_shape
from lora_utils.memory.simulation import require_support
from lora_utils.memory.unet_footprint import StepShape, sampling_footprint
from lora_utils.model import text as text_module
from lora_utils.model.architectures import Architecture, find_architecture
from lora_utils.model.vae import encoding_dtype, plan_decoding, plan_encoding
from lora_utils.system.device import DTYPES, GIB, Precision, choose_precision

LIBRARIES_GIB, CUDA_HOST_GIB = (
    0.7,
    1.5,
)  # resident: Python with torch, diffusers and peft (measured); CUDA (allowance)
LOADING_SHARE = 0.15  # of a weight file that is in host memory while it streams to a card
PICTURE_GIB = 2e-3


@dataclass(frozen=True)
class StageForecast:
    """What one stage needs."""

    name: str
    allocated_gib: float
    """Most that tensors take."""
    reserved_gib: float
    """Most that torch takes from this card for them; it gives empty blocks back where the card would be full."""
    parts_gib: dict[str, float]
    """On the card, from the bottom up: base, adapter, optimizer, activations, allocator, context."""
    seconds: float
    per: str
    """What takes these seconds: caption, image, step, run or picture."""
    kernels: int
    tflop: float
    host_ram_gib: float
    disk_gib: float
    """Downloaded and written."""


@dataclass(frozen=True)
class StageContext:
    """What all stages share."""

    config: RunConfig
    card: Card
    shape: Architecture
    step: StepShape
    shapes: Mapping[Size, int]
    """Examples of each width and height."""

    @property
    def largest(self) -> Size:
        return max(self.shapes, key=math.prod)

    @property
    def examples(self) -> int:
        return sum(self.shapes.values())

    def footprint(self, function: Any, *args: Any) -> Footprint:
        return cached_on_disk(function, *args, folder=self.config.paths.cache_dir)

    def file_gib(self, weights: int, itemsize: int | None = None) -> float:
        """Of a weight file, as it is downloaded."""
        return weights * (itemsize or (2 if self.config.model.variant == "fp16" else 4)) / GIB


def captions_forecast(setting: StageContext) -> StageForecast:
    """Both text encoders on a batch of captions."""
    step, chunks = setting.step, setting.config.data.max_token_length // 75
    dtype, rows = DTYPES[step.precision], text_module.CAPTIONS_PER_BATCH * chunks
    found = setting.footprint(captions_footprint, setting.shape.text_encoders, rows, dtype)
    file = setting.file_gib(found.weights)
    width = sum(config["hidden_size"] for config in setting.shape.text_encoders)
    record = (step.tokens * width + setting.shape.text_encoders[1]["projection_dim"]) * dtype.itemsize / GIB
    disk = setting.examples * record + _download(setting, file)
    return _stage(setting, "captions", found, file, disk, "caption", 1 / text_module.CAPTIONS_PER_BATCH)


def images_forecast(setting: StageContext) -> StageForecast:
    """The VAE's encoder on a batch of the largest images, cut into tiles as precompute does."""
    model, data = setting.config.model, setting.config.data
    vae = plan_encoding(
        setting.largest, encoding_dtype(model), data.vae_batch_size, _vae_card_gib(setting.card)
    )
    found = setting.footprint(
        encoding_footprint, setting.shape.vae, setting.largest, vae.batch, vae.dtype, vae.tile_px
    )
    channels = 2 * setting.shape.vae.get("latent_channels", 4)
    latents = (
        sum(math.prod(size) * count for size, count in setting.shapes.items()) / setting.shape.scale_factor**2
    )
    own_vae = model.pretrained_vae_model_name_or_path
    file = setting.file_gib(found.weights, 4 if own_vae else None)
    variants = (2 if data.random_flip else 1) * (data.crop_variants if data.random_crop else 1)
    disk = channels * latents * variants * (4 if setting.step.precision == "fp32" else 2) / GIB
    disk += 0 if own_vae and Path(own_vae).is_dir() else _download(setting, file)
    slowdown = FP32_SLOWDOWN if model.vae_precision == "fp32" and not setting.card.is_measured else 1.0
    return _stage(setting, "images", found, file, disk, "image", slowdown / vae.batch)


def training_forecast(setting: StageContext, found: Footprint) -> StageForecast:
    """The planned step, with all its micro-batches and the update."""
    train, kept = (
        setting.config.train,
        setting.config.checkpoint.checkpoints_total_limit + 1,
    )  # one is being written
    file = setting.file_gib(found.weights)
    checkpoints = kept * (found.trainable * 4 + found.held_bytes["optimizer"]) / GIB
    return _stage(
        setting,
        "train",
        found,
        file,
        checkpoints + _download(setting, file),
        "step",
        train.gradient_accumulation_steps,
    )


def save_forecast(setting: StageContext, found: Footprint) -> StageForecast:
    """The adapter written: scaled into a copy on the card, then through host memory."""
    copy = found.trainable * 4
    held = {name: size for name, size in found.held_bytes.items() if name != "gradients"}
    peak = sum(held.values()) + copy
    nothing = Work(0, {}, 0)
    saving = Footprint(peak, found.reserved_bytes, found.needed_bytes, held, {}, nothing, nothing)
    return _stage(setting, "save", saving, 0.0, copy / GIB, "run", 0.0)


def comparison_forecast(setting: StageContext, training: Footprint) -> StageForecast:
    """The U-Net on one picture, with guidance on two latents; then the VAE's decoder in fp32, the U-Net gone."""
    compare, size = setting.config.compare, setting.config.data.resolution
    batch = 2 if compare.guidance_scale > 1 else 1
    step = replace(setting.step, size_px=size)
    sampling = sampling_footprint(step, batch, training)
    area = math.prod(size) / math.prod(setting.step.size_px)
    vae = plan_decoding(size, _vae_card_gib(setting.card))
    decoding = setting.footprint(decoding_footprint, setting.shape.vae, size, vae.dtype, vae.tile_px)
    largest = max(sampling, decoding, key=lambda one: one.peak_bytes)
    pictures = 2 * len(compare.prompt) * len(compare.seeds)
    drawn = _stage(
        setting, "compare", largest, setting.file_gib(training.weights), pictures * PICTURE_GIB, "picture"
    )
    seconds = compare.num_inference_steps * area * _seconds(setting.card, sampling)
    seconds += _seconds(setting.card, decoding) * (1 if setting.card.is_measured else FP32_SLOWDOWN)
    tflop = compare.num_inference_steps * area * sampling.work.tflop + decoding.work.tflop
    kernels = compare.num_inference_steps * sampling.work.kernels + decoding.work.kernels
    return replace(drawn, seconds=seconds, tflop=tflop, kernels=kernels)


def _stage(
    setting: StageContext,
    name: str,
    found: Footprint,
    file_gib: float,
    disk_gib: float,
    per: str,
    times: float = 1.0,
) -> StageForecast:
    card, held = setting.card, {kind: size / GIB for kind, size in found.held_bytes.items()}
    peak, reserved = found.peak_bytes / GIB, found.reserved_bytes / GIB
    limit = (name == "train" and setting.config.train.vram_gib) or card.usable_gib
    reserved = max(found.needed_bytes / GIB, min(reserved, limit))
    gradients = held.get("gradients", 0.0) if setting.step.accumulates and name == "train" else 0.0
    on_gpu = card.compute_capability is not None
    parts = {
        "base": held["base"],
        "adapter": held.get("adapter", 0.0) + gradients,
        "optimizer": held.get("optimizer", 0.0),
    }
    parts["activations"] = peak - sum(parts.values())
    parts |= {"allocator": max(0.0, reserved - peak), "context": CONTEXT_GIB if on_gpu else 0.0}
    host = LIBRARIES_GIB + (CUDA_HOST_GIB + LOADING_SHARE * file_gib if on_gpu else peak)
    work, seconds = found.work, times * _seconds(card, found)
    return StageForecast(name, peak, reserved, parts, seconds, per, work.kernels, work.tflop, host, disk_gib)


def _seconds(card: Card, found: Footprint) -> float:
    work = found.work
    return card.seconds(work.flops, work.streamed_bytes, work.kernels)


def _vae_card_gib(card: Card) -> float | None:
    """None of a CPU, which is always the one that is here."""
    return None if card.compute_capability is None else card.total_gib


def _download(setting: StageContext, file_gib: float) -> float:
    return 0.0 if setting.shape.is_local else file_gib


OFF_BY = 0.03


@dataclass(frozen=True)
class Forecast:
    """What a run needs on a card."""

    card: Card
    precision: Precision
    """What the U-Net and the text encoders compute in."""
    stages: dict[str, StageForecast]
    """By name, in order: captions, images, train, save, compare."""
    plan: Plan
    """What training recomputes."""
    prices: Prices
    """What it could recompute."""
    budget_gib: float
    """What training may reserve."""
    assumes_sdxl: bool
    """The base model's shapes are not here yet, and SDXL's own are taken."""


def forecast(
    config: RunConfig,
    card: Card,
    shapes: Mapping[Size, int] | None = None,
    precision: Precision | None = None,
) -> Forecast:
    """What every stage of a run needs on a card. Downloads nothing.

    Args:
        config: Of the run.
        card: From ``cards.card`` or ``cards.card_at_hand``.
        shapes: How many examples there are of each width and height in pixels; one of the resolution when not given.
        precision: What the U-Net computes in; what the settings and the card say when not given.

    Raises:
        SimulationError: This version of torch cannot be simulated.
    """
    require_support()
    shapes = shapes or {config.data.resolution: 1}
    shape = find_architecture(config.model, config.paths.cache_dir)
    if precision is None:
        precision = choose_precision(config.model.mixed_precision, card.compute_capability)
    step = step_shape(config, precision, shape, max(shapes, key=math.prod))
    budget = config.train.vram_gib or card.usable_gib
    found = plan_step(step, card, budget, config.train.gradient_checkpointing, config.paths.cache_dir)
    setting = StageContext(config, card, shape, step, shapes)
    stages = [
        captions_forecast(setting),
        images_forecast(setting),
        training_forecast(setting, found.planned),
        save_forecast(setting, found.planned),
        comparison_forecast(setting, found.plain),
    ]
    by_name = {stage.name: stage for stage in stages}
    return Forecast(card, precision, by_name, found.plan, found.prices, budget, shape.is_assumed)


def replan(forecast: Forecast, measured_bytes: int, budget_gib: float | None = None) -> Plan | None:
    """Another plan after the first real step, if that was more than 3 % off; None where the plan can stay.

    Args:
        forecast: What was expected.
        measured_bytes: Most that tensors really took.
        budget_gib: What may be reserved; the forecast's when not given.
    """
    expected = forecast.plan.predicted_bytes
    if not forecast.prices.units or abs(measured_bytes / expected - 1) <= OFF_BY:
        return None
    stage = forecast.stages["train"]
    overhead = max(0.0, stage.reserved_gib - stage.allocated_gib) * GIB
    budget = (budget_gib or forecast.budget_gib) * GIB
    found = choose(forecast.prices, budget - overhead - (measured_bytes - expected))
    return None if found == forecast.plan else found
