"""What a stage needs of the device: how much was used, and giving it back."""

import gc

import torch

GIB = 2**30
FP32_ENCODE_GIB = 2.8  # SDXL's VAE, one image of 1024x1024; counted, and confirmed on a GPU only when benchmarked there
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
    """Most memory that tensors took on the GPU since the process began, in GiB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def vae_batch(area_px: int, dtype: torch.dtype) -> int:
    """Images that the VAE encodes together: what fits in half of the card, at most 4; on a CPU 65,536 pixels.

    Args:
        area_px: Of one image, in pixels.
        dtype: Of the VAE.
    """
    if not torch.cuda.is_available():
        return max(1, min(8, CPU_BATCH_PX // area_px))
    per_image_gib = FP32_ENCODE_GIB * area_px / 2**20 * dtype.itemsize / 4
    total_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    return max(1, min(4, int(total_gib / 2 / per_image_gib)))
