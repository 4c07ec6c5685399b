"""What computes, and in which precision."""

import re
from dataclasses import dataclass

import torch

from lora_utils import UserError
from lora_utils.system.launcher import launched_precision

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Precision:
    """How the U-Net computes, and why."""

    name: str
    """fp32, fp16 or bf16."""
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


BF16_FROM = (8, 0)
"""Compute capability of the first cards with bf16 arithmetic."""


class MachineError(UserError):
    """The machine cannot do what the settings ask for."""


def compute_capability() -> tuple[int, int] | None:
    """Of the GPU here, (7, 5) for a T4's sm_75; None without a GPU.

    Raises:
        MachineError: This build of torch has no kernels for the GPU.
    """
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    built_for = torch.cuda.get_arch_list()
    if not any(_runs_on(architecture, capability) for architecture in built_for):
        major, minor = capability
        raise MachineError(
            f"this build of torch ({torch.__version__}) has no kernels for {torch.cuda.get_device_name()}, "
            f"sm_{major}{minor}, but for {' '.join(built_for)}; install one that has, or take another card"
        )
    return capability


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for sm_75, or to be compiled from compute_75, runs on a card."""
    kind, _, number = architecture.partition("_")
    digits = re.match(r"\d+", number)  # sm_90a has a letter behind them
    if digits is None:
        return False
    built = divmod(int(digits[0]), 10)
    # Binaries run on later cards of the same generation, PTX on all later ones.
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def choose_precision(wanted: str, capability: tuple[int, int] | None) -> Precision:
    """The precision on a card: the one rule for training, encoding, comparing and forecasts.

    Args:
        wanted: The setting mixed_precision. auto follows ``accelerate launch --mixed_precision`` where that
            was given, else the card: bf16 from sm_80, fp16 below.
        capability: Compute capability of the card; None of a CPU.

    Raises:
        MachineError: fp16 without a GPU, or bf16 on a card that only emulates it.
    """
    if wanted == "fp16" and capability is None:
        raise MachineError("mixed_precision=fp16 needs a CUDA GPU, and there is none; set it to auto or fp32")
    if wanted != "auto":
        _require_bf16(wanted, capability, "mixed_precision=bf16")
        return Precision(wanted, "mixed_precision says so")
    launched = (launched_precision() or "no").lower()
    _require_bf16(launched, capability, "accelerate launch --mixed_precision=bf16")
    # Its "no" is what it says when nobody asked it, and so no answer; a CPU computes in bf16, not in fp16.
    if launched in DTYPES and (capability is not None or launched != "fp16"):
        return Precision(launched, "accelerate launch says so")
    if capability is None:
        return Precision("fp32", "there is no GPU")
    # Not torch's is_bf16_supported: a T4 answers True to it, and emulates bf16 slowly.
    major, minor = capability
    if capability >= BF16_FROM:
        return Precision("bf16", f"sm_{major}{minor} has bf16 arithmetic")
    return Precision("fp16", f"sm_{major}{minor} has no bf16 arithmetic")


def _require_bf16(precision: str, capability: tuple[int, int] | None, asked: str) -> None:
    # Emulated it is slow, and attention has no kernel for it there: whole matrices of scores would be kept.
    if precision == "bf16" and capability is not None and capability < BF16_FROM:
        major, minor = capability
        raise MachineError(f"{asked} needs a card from sm_80; this one is sm_{major}{minor}: leave it out")
