"""model.vae: carried out of encoders, memory, sdxl."""

from functools import cache

import psutil
import torch
from diffusers import (
    AutoencoderKL,
)
from torch import Tensor

from lora_utils.system.device import GIB


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
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
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images from latents, as SDXL's pipeline decodes them.

    Args:
        vae: In fp32.
        latents: (N, C, h, w), scaled, on any device.

    Returns:
        Pixels, (N, 3, 8h, 8w), fp32, in [-1, 1] but for overshoot, on the CPU.
    """
    latents = latents.to(vae.device, vae.dtype)
    return vae.decode(latents / vae.config.scaling_factor).sample.float().cpu()


# SDXL's VAE in fp32, and what it takes for an image of 1024x1024; counted on its graph, not yet measured on a GPU.
VAE_GIB, ENCODE_GIB, DECODE_GIB = 0.31, 2.51, 3.0
TILES_PX = (1024, 512)
SPARE_GIB = 1.25  # context, convolutions' workspaces, a desktop
CPU_BATCH_PX = 2**16


def vae_tile(
    size: tuple[int, int], dtype: torch.dtype, image_gib: float = ENCODE_GIB, device_gib: float | None = None
) -> int | None:
    """Side of the tiles that the VAE must cut an image into, in pixels; None where all of it fits.

    By the size of the card, not by what is free: tiles change values a little, and equal images on one machine must
    give equal records.

    Args:
        size: Width and height, pixels.
        dtype: Of the VAE.
        image_gib: ENCODE_GIB or DECODE_GIB.
        device_gib: Memory of another device than the one that is here.
    """
    usable_gib = (device_gib or _device_gib()) - SPARE_GIB
    if _vae_gib(size[0] * size[1], dtype, image_gib) <= usable_gib:
        return None
    fitting = (tile for tile in TILES_PX if _vae_gib(tile * tile, dtype, image_gib) <= usable_gib)
    return next(fitting, TILES_PX[-1])


def vae_batch(area_px: int, dtype: torch.dtype, card_gib: float | None = None) -> int:
    """Images that the VAE encodes together: what fits in half of the card, at most 4; on a CPU 65,536 pixels.

    Args:
        area_px: Of one image, or of one tile, in pixels.
        dtype: Of the VAE.
        card_gib: Memory of another card than the one that is here.
    """
    if not card_gib and not torch.cuda.is_available():
        return max(1, min(8, CPU_BATCH_PX // area_px))
    one_gib, two_gib = (_vae_gib(count * area_px, dtype, ENCODE_GIB) for count in (1, 2))
    return max(1, min(4, 1 + int(((card_gib or _device_gib()) / 2 - one_gib) / (two_gib - one_gib))))


def _vae_gib(area_px: int, dtype: torch.dtype, image_gib: float) -> float:
    return (VAE_GIB + image_gib * area_px / 2**20) * dtype.itemsize / 4


@cache
def _device_gib() -> float:
    """Size of the card, or of the host's memory where there is none."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().total / GIB
    return torch.cuda.mem_get_info()[1] / GIB


def tile_vae(vae: AutoencoderKL, tile_px: int | None) -> None:
    """Make the VAE cut what is larger than ``tile_px`` on a side into tiles; None for never.

    ``enable_tiling`` alone keeps the tile of the VAE's config, 1024 in SDXL, and does nothing up to 1024x1024.
    """
    vae.use_tiling = tile_px is not None
    if tile_px is not None:
        vae.tile_sample_min_size = tile_px
        vae.tile_latent_min_size = tile_px // 2 ** (len(vae.config["block_out_channels"]) - 1)
