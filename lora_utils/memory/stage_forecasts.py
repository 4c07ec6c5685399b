"""One forecast for each stage: GPU memory, seconds, host memory and files.

Peaks are counted on the models' own graphs (``footprint``, ``unet_footprint``), times are a roofline of the
card (``cards``); host memory and disk are sums over files.
"""

import math
from collections.abc import Callable, Mapping
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
from lora_utils.memory.operators import NO_WORK
from lora_utils.memory.planning import training_footprint
from lora_utils.memory.step_shape import HELD_OUT_TIMESTEPS, StepShape
from lora_utils.model import text as text_module
from lora_utils.model.architectures import Architecture
from lora_utils.model.vae import encoding_dtype, plan_decoding, plan_encoding
from lora_utils.system.device import DTYPES, best_device
from lora_utils.system.units import GIB

LIBRARIES_GIB = 0.7  # resident: Python with torch, diffusers and peft; measured
CUDA_HOST_GIB = 1.5  # resident: CUDA's own; an allowance
LOADING_SHARE = 0.15  # of a weight file that is in host memory while it streams to a card
PICTURE_GIB = 2e-3  # of a PNG


@dataclass(frozen=True)
class StageForecast:
    """What one stage needs."""

    name: str
    allocated_gib: float
    """Most that tensors take."""
    reserved_gib: float
    """Most that torch takes from this card for them; it gives empty blocks back where it would be full."""
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
    architecture: Architecture
    """Of the base model."""
    shape: StepShape
    """Of a micro-batch, with nothing recomputed."""
    sizes: Mapping[Size, int]
    """Examples of each width and height in pixels."""

    @property
    def largest(self) -> Size:
        """The size of most pixels, which decides the peaks."""
        return max(self.sizes, key=math.prod)

    @property
    def examples(self) -> int:
        """How many there are in all."""
        return sum(self.sizes.values())

    def footprint(self, function: Callable[..., Footprint], *args: Any) -> Footprint:
        """The function's result, from the run's own folder where it was counted before."""
        return cached_on_disk(function, *args, folder=self.config.paths.cache_dir)

    def file_gib(self, weights: int, itemsize: int | None = None) -> float:
        """Of a weight file, as it is downloaded.

        Args:
            weights: How many numbers it holds.
            itemsize: Bytes of each; as the variant says when not given.
        """
        if itemsize is None:
            itemsize = 2 if self.config.model.variant == "fp16" else 4
        return weights * itemsize / GIB


def captions_forecast(context: StageContext) -> StageForecast:
    """Both text encoders on a batch of captions."""
    encoders = context.architecture.text_encoders
    dtype = DTYPES[context.shape.precision]
    # A caption of 150 or 225 tokens is two or three rows of 77, which go through the encoders side by side.
    chunks = context.config.data.max_token_length // 75
    rows = text_module.CAPTIONS_PER_BATCH * chunks
    footprint = context.footprint(captions_footprint, encoders, rows, dtype)

    file = context.file_gib(footprint.weights)
    width = sum(config["hidden_size"] for config in encoders)
    pooled_width = encoders[1]["projection_dim"]
    record = (context.shape.tokens * width + pooled_width) * dtype.itemsize / GIB
    disk = context.examples * record + _download(context, file)
    return _stage(context, "captions", footprint, file, disk, "caption", 1 / text_module.CAPTIONS_PER_BATCH)


def images_forecast(context: StageContext) -> StageForecast:
    """The VAE's encoder on a batch of the largest images, cut into tiles as precompute does."""
    model = context.config.model
    data = context.config.data
    vae_config = context.architecture.vae
    vae = plan_encoding(
        context.largest, encoding_dtype(model), data.vae_batch_size, _vae_card_gib(context.card)
    )
    footprint = context.footprint(
        encoding_footprint, vae_config, context.largest, vae.batch, vae.dtype, vae.tile_px
    )

    # Moments, twice as many channels as latents, of every example in every variant that training will draw
    # from.
    channels = 2 * vae_config.get("latent_channels", 4)
    pixels = sum(math.prod(size) * count for size, count in context.sizes.items())
    latents = pixels / context.architecture.scale_factor**2
    variants = 2 if data.random_flip else 1
    if data.random_crop:
        variants *= data.crop_variants
    itemsize = 4 if context.shape.precision == "fp32" else 2
    disk = channels * latents * variants * itemsize / GIB

    own_vae = model.pretrained_vae_model_name_or_path
    file = context.file_gib(footprint.weights, 4 if own_vae else None)  # the variant is the base model's
    if not (own_vae and Path(own_vae).is_dir()):
        disk += _download(context, file)

    is_slow = model.vae_precision == "fp32" and _has_half_rates(context)
    slowdown = FP32_SLOWDOWN if is_slow else 1.0
    return _stage(context, "images", footprint, file, disk, "image", slowdown / vae.batch)


def training_forecast(context: StageContext, footprint: Footprint) -> StageForecast:
    """The planned step, with all its micro-batches and the update."""
    file = context.file_gib(footprint.weights)
    checkpoint = (footprint.trainable * 4 + footprint.resident_bytes["optimizer"]) / GIB
    checkpoints = context.config.checkpoint.checkpoints_total_limit + 1  # one is being written
    disk = checkpoints * checkpoint + _download(context, file)
    micro_batches = context.config.train.gradient_accumulation_steps
    return _stage(context, "train", footprint, file, disk, "step", micro_batches)


def held_out_forecast(context: StageContext, training: Footprint) -> StageForecast:
    """The held-out loss measured once: batches like training's without gradients, beside the optimiser.

    Args:
        context: Its examples are those of the whole data set.
        training: Of a micro-batch with nothing recomputed.
    """
    batch = context.shape.batch
    footprint = context.footprint(sampling_footprint, context.shape, batch, training)
    resident = {name: training.resident_bytes[name] for name in ("base", "adapter", "optimizer")}
    more = sum(resident.values()) - sum(footprint.resident_bytes.values())
    measuring = replace(
        footprint,
        peak_bytes=footprint.peak_bytes + more,
        reserved_bytes=footprint.reserved_bytes + more,
        needed_bytes=footprint.needed_bytes + more,
        resident_bytes=resident,
    )
    held_out = max(1, round(context.examples * context.config.data.validation_split))
    batches = held_out * math.ceil(HELD_OUT_TIMESTEPS / batch)
    return _stage(context, "held-out", measuring, 0.0, 0.0, "measurement", batches)


def save_forecast(context: StageContext, footprint: Footprint) -> StageForecast:
    """The adapter written: scaled into a copy on the card, then through host memory."""
    copy = footprint.trainable * 4
    resident = {name: size for name, size in footprint.resident_bytes.items() if name != "gradients"}
    peak = sum(resident.values()) + copy
    # What the allocator took for the step before, it still has.
    saving = Footprint(peak, footprint.reserved_bytes, footprint.needed_bytes, resident, {}, NO_WORK, NO_WORK)
    return _stage(context, "save", saving, 0.0, copy / GIB, "run", 0.0)


def comparison_forecast(context: StageContext, training: Footprint) -> StageForecast:
    """The U-Net on one picture, with guidance on two latents; then the VAE's decoder in fp32, the U-Net gone.

    Args:
        context: Its resolution is the picture's, which the largest example's need not be.
        training: Of a micro-batch with nothing recomputed.
    """
    compare = context.config.compare
    size = context.config.data.resolution
    batch = 2 if compare.guidance_scale > 1 else 1
    sampling = context.footprint(sampling_footprint, replace(context.shape, size_px=size), batch, training)
    vae = plan_decoding(size, _vae_card_gib(context.card))
    decoding = context.footprint(decoding_footprint, context.architecture.vae, size, vae.dtype, vae.tile_px)
    larger = max(sampling, decoding, key=lambda footprint: footprint.peak_bytes)
    pictures = 2 * len(compare.prompt) * len(compare.seeds)  # without the adapter, and with it
    file = context.file_gib(training.weights)
    stage = _stage(context, "compare", larger, file, pictures * PICTURE_GIB, "picture")

    # Many denoising steps and one decoding. The sampling step's work is that of training's size: by pixels.
    area = math.prod(size) / math.prod(context.shape.size_px)
    denoising_steps = compare.num_inference_steps
    seconds = denoising_steps * area * _seconds(context.card, sampling)
    seconds += _seconds(context.card, decoding) * (FP32_SLOWDOWN if _has_half_rates(context) else 1)
    tflop = denoising_steps * area * sampling.work.tflop + decoding.work.tflop
    kernels = denoising_steps * sampling.work.kernels + decoding.work.kernels
    return replace(stage, seconds=seconds, tflop=tflop, kernels=kernels)


def sampling_footprint(shape: StepShape, batch: int, training: Footprint) -> Footprint:
    """As ``unet_footprint``'s, which loads diffusers and peft: for a step that was not counted before."""
    from lora_utils.memory import unet_footprint

    return unet_footprint.sampling_footprint(shape, batch, training)


def workspace_bytes(context: StageContext) -> int:
    """Of the training step's convolutions; 0 where the card is not the one here."""
    card = context.card
    if not (card.is_gpu and card.is_measured):
        return 0
    from lora_utils.memory.workspaces import convolution_workspace

    plain = context.footprint(training_footprint, context.shape)
    dtype = DTYPES[context.shape.precision]
    return convolution_workspace(plain.convolutions, dtype, best_device())


def _stage(
    context: StageContext,
    name: str,
    footprint: Footprint,
    file_gib: float,
    disk_gib: float,
    per: str,
    times: float = 1.0,
) -> StageForecast:
    """From a footprint to what the card shows.

    Args:
        context: Card and settings.
        name: Of the stage.
        footprint: Of what runs at a time.
        file_gib: The weight file that is read.
        disk_gib: Downloaded and written.
        per: What the seconds are told for.
        times: How often the footprint's work is done for that.
    """
    card = context.card
    resident = {name: size / GIB for name, size in footprint.resident_bytes.items()}
    peak = footprint.peak_bytes / GIB

    # torch keeps empty blocks until the card is full, but cannot do with less than it needs.
    limit = (name == "train" and context.config.train.vram_gib) or card.usable_gib
    reserved = max(footprint.needed_bytes / GIB, min(footprint.reserved_bytes / GIB, limit))

    # Without accumulation gradients come while activations go, and are not there at the peak.
    are_kept = name == "train" and context.shape.accumulates
    gradients = resident.get("gradients", 0.0) if are_kept else 0.0
    parts = {
        "base": resident["base"],
        "adapter": resident.get("adapter", 0.0) + gradients,
        "optimizer": resident.get("optimizer", 0.0),
    }
    parts["activations"] = peak - sum(parts.values())
    parts["allocator"] = max(0.0, reserved - peak)
    parts["context"] = CONTEXT_GIB if card.is_gpu else 0.0

    host = LIBRARIES_GIB + (CUDA_HOST_GIB + LOADING_SHARE * file_gib if card.is_gpu else peak)
    seconds = times * _seconds(card, footprint)
    work = footprint.work
    return StageForecast(name, peak, reserved, parts, seconds, per, work.kernels, work.tflop, host, disk_gib)


def _seconds(card: Card, footprint: Footprint) -> float:
    work = footprint.work
    return card.seconds(work.flops, work.streamed_bytes, work.kernels)


def _has_half_rates(context: StageContext) -> bool:
    """Whether the card's rates are half precision's: the table's are, and measured ones are the U-Net's."""
    return not (context.card.is_measured and context.shape.precision == "fp32")


def _vae_card_gib(card: Card) -> float | None:
    """None of a CPU, which is always the one that is here."""
    return card.total_gib if card.is_gpu else None


def _download(context: StageContext, file_gib: float) -> float:
    return 0.0 if context.architecture.is_local else file_gib
