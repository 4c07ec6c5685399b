"""What a stage needs of the device: how much was used, and giving it back."""

import gc
from dataclasses import dataclass

import torch

from lora_utils import UserError
from lora_utils.system.launcher import launched_precision
from lora_utils.system.units import GIB

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory() -> None:
    """Collect what nothing refers to any more and return cached blocks to the device."""
    # Models that refer to themselves are freed by the collector alone, and only then can their blocks be
    # returned.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_gib() -> float | None:
    """Most memory of tensors on the GPU since the start, or since it was forgotten; None without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def forget_peak_memory() -> None:
    """Let ``peak_memory_gib`` count from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


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


def compute_capability() -> tuple[int, int] | None:
    """Of the GPU here, (7, 5) for a T4's sm_75; None without a GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def choose_precision(wanted: str, capability: tuple[int, int] | None) -> Precision:
    """The precision on a card: the one rule for training, encoding, comparing and forecasts.

    Args:
        wanted: The setting mixed_precision. auto follows ``accelerate launch --mixed_precision`` where that
            was given, else the card: bf16 from sm_80, fp16 below.
        capability: Compute capability of the card; None of a CPU.

    Raises:
        MachineError: fp16 without a GPU.
    """
    if wanted == "fp16" and capability is None:
        raise MachineError("mixed_precision=fp16 needs a CUDA GPU, and there is none; set it to auto or fp32")
    if wanted != "auto":
        return Precision(wanted, "mixed_precision says so")
    launched = (launched_precision() or "no").lower()
    # Its "no" is what it says when nobody asked it, and so no answer; a CPU computes in bf16, not in fp16.
    if launched in DTYPES and (capability is not None or launched != "fp16"):
        return Precision(launched, "accelerate launch says so")
    if capability is None:
        return Precision("fp32", "there is no GPU")
    # Not torch's is_bf16_supported: a T4 answers True to it, and emulates bf16 slowly.
    major, minor = capability
    if capability >= (8, 0):
        return Precision("bf16", f"sm_{major}{minor} has bf16 arithmetic")
    return Precision("fp16", f"sm_{major}{minor} has no bf16 arithmetic")
