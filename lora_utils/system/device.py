"""What a stage needs of the device: how much was used, and giving it back."""

import gc
from functools import cache

import psutil
import torch

GIB = 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# SDXL's VAE in fp32, and what it takes for an image of 1024x1024; counted on its graph, not yet measured on a GPU.
VAE_GIB, ENCODE_GIB, DECODE_GIB = 0.31, 2.51, 3.0
TILES_PX = (1024, 512)
SPARE_GIB = 1.25  # context, convolutions' workspaces, a desktop
CPU_BATCH_PX = 2**16


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory() -> None:
    """Collect what nothing refers to any more and return cached blocks to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_gib() -> float | None:
    """Most memory that tensors took on the GPU since the process began or forgot, in GiB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def forget_peak_memory() -> None:
    """Let ``peak_memory_gib`` count from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


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
