"""All that decides what a training step needs. Knows no diffusers: a count that is on disk needs none."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_utils.config.section import Size
from lora_utils.config.training import LoraConfig
from lora_utils.memory.gradient_checkpointing import Plan

HELD_OUT_TIMESTEPS = 8
"""At which the held-out loss sees each of its examples."""


@dataclass(frozen=True)
class StepShape:
    """All that decides what a micro-batch and its update need."""

    unet: dict[str, Any]
    """config.json."""
    lora: LoraConfig
    precision: str
    """Of the computation: fp32, fp16 or bf16."""
    base: Literal["plain", "int8", "nf4"]
    """How the transformers' frozen weights are kept."""
    optimizer: str
    """A value of the setting ``optimizer``."""
    batch: int
    """Examples in the micro-batch."""
    size_px: Size
    """Width and height."""
    tokens: int
    """Of a caption as the U-Net sees it: 77, 152 or 227."""
    is_lean: bool = True
    """The lean step; else peft's forward under autocast."""
    accumulates: bool = False
    """Gradients of earlier micro-batches are there."""
    has_average: bool = False
    """An EMA of the adapter."""
    scale_factor: int = 8
    """Pixels to a latent."""
    workspace_bytes: int = 0
    """That a convolution takes while it runs, where that was measured."""
    plan: Plan = field(default_factory=Plan)
    """What is recomputed."""
