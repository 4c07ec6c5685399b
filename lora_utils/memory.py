"""What a stage needs of the device: how much was used, and giving it back."""

import gc

import torch

GIB = 2**30


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
