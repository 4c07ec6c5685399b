"""What a stage needs of the device: how much was used, and giving it back."""

import gc
import os
from dataclasses import dataclass
from typing import Literal

import torch

from lora_utils import UserError

GIB = 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


def half_precision(capability: tuple[int, int]) -> Literal["fp16", "bf16"]:
    """What a card computes fastest in: bf16 from sm_80. A T4 answers True to ``is_bf16_supported`` but emulates it."""
    return "bf16" if capability >= (8, 0) else "fp16"


def precision_for(capability: tuple[int, int] | None, wanted: str) -> Literal["fp32", "fp16", "bf16"]:
    """What mixed_precision auto stands for on a card: bf16 from sm_80, fp16 below, fp32 on a CPU."""
    if wanted in ("fp32", "fp16", "bf16"):
        return wanted
    return "fp32" if capability is None else half_precision(capability)


@dataclass(frozen=True)
class Precision:
    """How the U-Net computes, and why."""

    name: str
    """fp32, fp16 or bf16."""
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


class MachineError(UserError):
    """The machine cannot do what the settings ask for."""


def choose_precision(wanted: str) -> Precision:
    """The precision for this machine.

    Args:
        wanted: The setting mixed_precision. auto follows ``accelerate launch --mixed_precision`` where that was given,
            else the card.

    Raises:
        MachineError: fp16 without a GPU.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted == "fp16" and not torch.cuda.is_available():
        raise MachineError("mixed_precision=fp16 needs a CUDA GPU, and there is none; set it to auto or fp32")
    if wanted != "auto":
        return Precision(wanted, "mixed_precision says so")
    if not torch.cuda.is_available():
        return Precision("fp32", "there is no GPU")
    if launched in DTYPES:
        return Precision(launched, "accelerate launch says so")
    major, minor = torch.cuda.get_device_capability()
    name = half_precision((major, minor))
    return Precision(name, f"sm_{major}{minor} has {'' if name == 'bf16' else 'no '}bf16 arithmetic")
