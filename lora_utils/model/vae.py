"""The VAE: pixels to moments, latents to pixels, and how to do that on a card that is too small for it.

Shapes: N images, C latent channels (4), h and w latent height and width (pixels / 8 in SDXL).

All that is decided about the VAE is decided here: its dtype, the tiles that images are cut into and how many
are encoded together. ``plan_encoding`` and ``plan_decoding`` answer whoever encodes, decodes or forecasts
either.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from lora_utils.config.schema import ModelConfig
from lora_utils.config.section import Size
from lora_utils.system.device import DTYPES
from lora_utils.system.units import GIB

if TYPE_CHECKING:  # forecasts plan the VAE without one
    from diffusers import AutoencoderKL

# SDXL's VAE in fp32, and what it takes for an image of 1024x1024: counted on its graph; an H200 took 0.4 %
# more (benchmarks/results/gpu_h200_sm75.json).
VAE_GIB = 0.31
ENCODE_GIB = 2.51
DECODE_GIB = 3.0
SPARE_GIB = 1.25  # context, convolutions' workspaces, a desktop

TILES_PX = (1024, 512)  # sides to choose from, the largest that fits
MOST_IMAGES = 4  # at a time, on a card
MOST_IMAGES_CPU = 8
CPU_BATCH_PX = 2**16
DECODING_DTYPE = torch.float32  # SDXL's own VAE overflows in fp16


@dataclass(frozen=True)
class VaePlan:
    """How the VAE goes through images of one size."""

    dtype: torch.dtype
    tile_px: int | None
    """Side of the tiles, pixels; None where whole images fit."""
    batch: int
    """Images at a time."""


def encoding_dtype(config: ModelConfig) -> torch.dtype:
    """What images are encoded in; SDXL's own VAE overflows in fp16."""
    return DTYPES[config.vae_precision]


def plan_encoding(
    size: Size, dtype: torch.dtype, batch: int | None = None, card_gib: float | None = None
) -> VaePlan:
    """How images become moments.

    Args:
        size: Width and height, pixels.
        dtype: From ``encoding_dtype``.
        batch: The setting vae_batch_size, where it is given.
        card_gib: Memory of another card than the one that is here.
    """
    tile_px = vae_tile(size, dtype, ENCODE_GIB, card_gib)
    area_px = size[0] * size[1]
    if tile_px is not None:  # one tile is in the network at a time
        area_px = min(area_px, tile_px**2)
    return VaePlan(dtype, tile_px, batch or vae_batch(area_px, dtype, card_gib))


def plan_decoding(size: Size, card_gib: float | None = None) -> VaePlan:
    """How latents become an image; arguments as for ``plan_encoding``."""
    return VaePlan(DECODING_DTYPE, vae_tile(size, DECODING_DTYPE, DECODE_GIB, card_gib), 1)


def vae_tile(
    size: Size, dtype: torch.dtype, image_gib: float = ENCODE_GIB, device_gib: float | None = None
) -> int | None:
    """Side of the tiles that the VAE must cut an image into, in pixels; None where all of it fits.

    By the size of the card, not by what is free: tiles change values a little, and equal images on one
    machine must give equal records.

    Args:
        size: Width and height, pixels.
        dtype: Of the VAE.
        image_gib: ENCODE_GIB or DECODE_GIB.
        device_gib: Memory of another device than the one that is here.
    """
    usable_gib = (device_gib or _device_gib()) - SPARE_GIB
    if _vae_gib(size[0] * size[1], dtype, image_gib) <= usable_gib:
        return None
    for tile_px in TILES_PX:
        if _vae_gib(tile_px * tile_px, dtype, image_gib) <= usable_gib:
            return tile_px
    return TILES_PX[-1]  # where even that is too large, the encoder says so when it runs out of memory


def vae_batch(area_px: int, dtype: torch.dtype, card_gib: float | None = None) -> int:
    """Images that the VAE encodes together: what fits in half of the card, at most 4; on a CPU 65,536 pixels.

    Args:
        area_px: Of one image, or of one tile, in pixels.
        dtype: Of the VAE.
        card_gib: Memory of another card than the one that is here.
    """
    if not card_gib and not torch.cuda.is_available():
        return max(1, min(MOST_IMAGES_CPU, CPU_BATCH_PX // area_px))
    first_gib = _vae_gib(area_px, dtype, ENCODE_GIB)  # with the weights
    further_gib = _vae_gib(2 * area_px, dtype, ENCODE_GIB) - first_gib
    room_gib = (card_gib or _device_gib()) / 2 - first_gib
    return max(1, min(MOST_IMAGES, 1 + int(room_gib / further_gib)))


def _vae_gib(area_px: int, dtype: torch.dtype, image_gib: float) -> float:
    return (VAE_GIB + image_gib * area_px / 2**20) * dtype.itemsize / 4


@cache
def _device_gib() -> float:
    """Size of the card, or of the host's memory where there is none."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().total / GIB
    return torch.cuda.mem_get_info()[1] / GIB


def tile_vae(vae: "AutoencoderKL", tile_px: int | None) -> None:
    """Make the VAE cut what is larger than ``tile_px`` on a side into tiles; None for never.

    ``enable_tiling`` alone keeps the tile of the VAE's config, 1024 in SDXL, and does nothing up to
    1024x1024.
    """
    vae.use_tiling = tile_px is not None
    if tile_px is not None:
        vae.tile_sample_min_size = tile_px
        vae.tile_latent_min_size = tile_px // 2 ** (len(vae.config["block_out_channels"]) - 1)


@torch.no_grad()
def encode_images(vae: "AutoencoderKL", pixels: Tensor) -> Tensor:
    """Posterior mean and log-variance of images.

    Args:
        vae: In fp32: SDXL's own VAE overflows in fp16.
        pixels: (N, 3, 8h, 8w), fp32, in [-1, 1], on any device.

    Returns:
        Moments, (N, 2C, h, w), fp32, on the CPU.
    """
    weight = vae.encoder.conv_in.weight  # vae.device and vae.dtype walk through all parts of the model
    return vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist.parameters.float().cpu()


@torch.no_grad()
def decode_latents(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Images from latents, as SDXL's pipeline decodes them.

    Args:
        vae: In fp32.
        latents: (N, C, h, w), scaled, on any device.

    Returns:
        Pixels, (N, 3, 8h, 8w), fp32, in [-1, 1] but for overshoot, on the CPU.
    """
    latents = latents.to(vae.device, vae.dtype)
    return vae.decode(latents / vae.config.scaling_factor).sample.float().cpu()
