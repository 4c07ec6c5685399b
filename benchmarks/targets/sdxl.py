"""What each way costs on SDXL itself, by forecast: a step at 1024 px, batch 1, rank 32, fp16 base."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.targets.ways import Way
from lora_utils.config.training import LoraConfig
from lora_utils.memory.cards import T4
from lora_utils.memory.footprint import cached_on_disk
from lora_utils.memory.step_shape import StepShape
from lora_utils.memory.unet_footprint import training_footprint
from lora_utils.model import architectures

RANK = 32
GIB = 2**30


def forecast_of(way: Way) -> dict[str, Any]:
    """GiB that torch reserves, TFLOP and T4 seconds by roofline of a micro-batch; nothing recomputed.

    Keys are the columns' headers in docs/recipes.md.
    """
    with torch.device("meta"):
        layers = way.layers(UNet2DConditionModel.from_config(architectures.UNET))
    lora = LoraConfig(rank=RANK, target_modules=layers, conv_rank=way.conv_rank(RANK))
    shape = StepShape(architectures.UNET, lora, "fp16", "plain", "adamw", 1, (1024, 1024), 77)
    footprint = cached_on_disk(training_footprint, shape)
    work = footprint.work
    return {
        "layers": len(layers),
        "GiB reserved": round(footprint.reserved_bytes / GIB, 2),
        "TFLOP": round(work.tflop, 2),
        "T4 s": round(T4.seconds(work.flops, work.streamed_bytes, work.kernels), 3),
    }
