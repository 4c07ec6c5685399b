"""That the card computes what it should: gradients as peft's, fp16 as fp32, losses under every plan."""

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import REHEARSED_SHARE, Stage
from benchmarks.gpu.device import Settings, peaks, synchronise, timed
from benchmarks.gpu.peers import noise_schedule, random_batch, random_unet, updating
from benchmarks.gpu.smoke import Check
from lora_utils.config.training import LoraConfig, TrainConfig
from lora_utils.memory.gradient_checkpointing import BLOCK, Plan, apply_plan
from lora_utils.model import architectures, lora
from lora_utils.model.lean import make_lean
from lora_utils.system.device_memory import forget_peak_memory
from lora_utils.training.objective import denoising_errors, training_losses

MIDDLE = {
    "block_out_channels": [64, 128, 256],
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 4],
}
LOSSES = 20
REHEARSED_LOSSES = 2
HELD_OUT = 8  # examples
ADAPTED = LoraConfig(rank=8, target_modules=["attn+ff"])


def check_gradients(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Of a mid-size model's adapters: relative error in fp32 against peft's, cosine of fp16's with fp32's."""
    _shrink(settings)
    peft = _gradients(torch.float32, False, stage, settings)
    lean = _gradients(torch.float32, True, stage, settings)
    half = _gradients(torch.float16, True, stage, settings)
    cosine = torch.nn.functional.cosine_similarity(half.double(), lean.double(), dim=0)
    return {
        "lean_against_peft": float((lean - peft).norm() / peft.norm()),
        "fp16_cosine": float(cosine),
        "fp16_finite": bool(torch.isfinite(half).all()),
    }


def check_losses(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Of 20 steps on it, in fp16 with nothing, something and everything recomputed, and in fp32."""
    _shrink(settings)
    runs = {label: _losses(torch.float16, label, stage, settings) for label in ("none", "auto", "full")}
    exact = _losses(torch.float32, "none", stage, settings)
    figures: dict[str, Any] = {
        f"{label}_off_by": max(
            abs(loss / reference - 1) for loss, reference in zip(runs[label], runs["none"], strict=True)
        )
        for label in ("auto", "full")
    }
    figures["fp16_off_by"] = max(
        abs(loss / reference - 1) for loss, reference in zip(runs["none"], exact, strict=True)
    )
    return figures | {"first_loss": runs["none"][0], "last_loss": runs["none"][-1]}


def _shrink(settings: Settings) -> None:
    # What is compared must differ by what is tested alone, not by TF32's ten bits or by the choice of
    # kernels.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    if not settings.rehearse:
        architectures.UNET.update(MIDDLE)


def _unet(dtype: torch.dtype, settings: Settings) -> Any:
    """Equal values in every dtype, and adapters whose B is not zero, so that A learns too."""
    unet = random_unet("fp16", torch.float16, settings.device).to(dtype)
    lora.add_lora(unet, ADAPTED, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if ".lora_B." in name:
            parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(settings.device)
    return unet


def _gradients(dtype: torch.dtype, is_lean: bool, stage: Stage, settings: Settings) -> Tensor:
    unet = _unet(dtype, settings)
    if is_lean:
        make_lean(unet)
    batch = random_batch(2, stage.side_px, settings.device)
    scale = (
        2.0**12 if dtype == torch.float16 else 1.0
    )  # as GradScaler does, or small gradients are zero in fp16
    (training_losses(unet, batch, noise_schedule(), TrainConfig()).mean() * scale).backward()
    gradients = [parameter.grad for parameter in unet.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in gradients if grad is not None]) / scale


def _losses(dtype: torch.dtype, label: str, stage: Stage, settings: Settings) -> list[float]:
    unet = _unet(dtype, settings)
    schedule = noise_schedule()
    make_lean(unet)
    apply_plan(unet, Plan(_half_of_the_blocks(unet), "auto") if label == "auto" else Plan((), label))
    config = TrainConfig(learning_rate=1e-3)
    batches = [random_batch(2, stage.side_px, settings.device, seed) for seed in range(4)]
    turn = iter(batches * LOSSES)
    update = updating(
        unet, lambda: training_losses(unet, next(turn), schedule, config).mean(), config, settings.device
    )
    return [float(update()) for _ in range(REHEARSED_LOSSES if settings.rehearse else LOSSES)]


def _half_of_the_blocks(unet: torch.nn.Module) -> tuple[str, ...]:
    """Every second block whole, and the feed-forwards of the others."""
    blocks = [name for name, module in unet.named_modules() if type(module).__name__ == BLOCK]
    return tuple(name if index % 2 else f"{name}.ff" for index, name in enumerate(blocks))


def sdxl_step(check: Check, settings: Settings) -> dict[str, Any]:
    """A step on a U-Net of SDXL's size, and the held-out loss of a batch of 8: time, and memory of both."""
    unet = random_unet(check.changes["base"], torch.float16, settings.device)
    lora.add_lora(unet, LoraConfig(rank=32, target_modules=["attn"]), seed=0)
    make_lean(unet)
    schedule = noise_schedule()
    config = TrainConfig()
    side_px = 1024 // REHEARSED_SHARE if settings.rehearse else 1024
    batch = random_batch(1, side_px, settings.device)
    step = updating(
        unet, lambda: training_losses(unet, batch, schedule, config).mean(), config, settings.device
    )
    forget_peak_memory()
    losses = [float(step()) for _ in range(settings.warmup or 1)]
    milliseconds = timed(step, settings)
    figures = {
        "losses": losses,
        "ms": statistics.median(milliseconds),
        "training_gib": peaks()["allocated_gib"],
    }

    held_out = random_batch(2 if settings.rehearse else HELD_OUT, side_px, settings.device)
    forget_peak_memory()
    with torch.no_grad():
        error = denoising_errors(unet.eval(), held_out, schedule).mean()
    synchronise(settings)
    return figures | {"held_out_gib": peaks()["allocated_gib"], "held_out": float(error)}
