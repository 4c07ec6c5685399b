"""One micro-batch: examples in, the U-Net's squared errors out. Shared by training and validation.

Shapes as in ``diffusion``; L tokens, D text width, P pooled width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_utils import diffusion
from lora_utils.sdxl import NoiseSchedule
from lora_utils.visits import Record


@dataclass(frozen=True)
class Batch:
    """Examples of one shape with the randomness of this visit."""

    latents: Tensor
    """(B, C, h, w), fp32."""
    noise: Tensor
    """(B, C, h, w), fp32."""
    timesteps: Tensor
    """(B,), int64."""
    prompt_embeds: Tensor
    """(B, L, D)."""
    pooled_prompt_embeds: Tensor
    """(B, P)."""
    time_ids: Tensor
    """(B, 6), fp32."""
    loss_mask: Tensor
    """(B, 1, h, w), fp32, in [0, 1]: where the error counts."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def visit(
    example: Record,
    generator: torch.Generator,
    schedule: NoiseSchedule,
    timestep: int | None = None,
    latent_mode: Literal["sample", "mean"] = "sample",
) -> Batch:
    """A batch of one: fresh latents, noise and timestep (uniform over all unless given) from the generator."""
    moments = example["moments"]
    if latent_mode == "mean":
        latents = diffusion.mean_latents(moments, schedule.scaling_factor)
    else:
        latents = diffusion.sample_latents(moments, schedule.scaling_factor, generator)
    noise = torch.randn(latents.shape, generator=generator)
    drawn = torch.randint(len(schedule.alphas_cumprod), (1,), generator=generator)
    mask = example.get("loss_mask")
    return Batch(
        latents=latents[None],
        noise=noise[None],
        timesteps=drawn if timestep is None else torch.tensor([timestep]),
        prompt_embeds=example["prompt_embeds"][None],
        pooled_prompt_embeds=example["pooled_prompt_embeds"][None],
        time_ids=example["time_ids"][None],
        loss_mask=torch.ones(1, 1, *latents.shape[-2:]) if mask is None else mask[None],
    )


def collate(visits: Sequence[Batch]) -> Batch:
    """Join batches of equal shapes."""
    return Batch(**{name: torch.cat([getattr(one, name) for one in visits]) for name in vars(visits[0])})


def denoising_errors(unet: UNet2DConditionModel, batch: Batch, schedule: NoiseSchedule) -> Tensor:
    """Squared error of each example where its mask counts (Ho et al., 2020, eq. 14), (B,), fp32.

    Args:
        unet: With or without adapter; a wrapped one may autocast.
        batch: On the device of the U-Net.
        schedule: Of the base model.
    """
    alphas_cumprod = schedule.alphas_cumprod.to(batch.latents.device)
    noisy_latents = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
    target = diffusion.training_target(
        batch.latents, batch.noise, batch.timesteps, alphas_cumprod, schedule.prediction_type
    )
    dtype = next(unet.parameters()).dtype
    prediction = unet(
        noisy_latents.to(dtype),
        batch.timesteps,
        encoder_hidden_states=batch.prompt_embeds.to(dtype),
        added_cond_kwargs={"text_embeds": batch.pooled_prompt_embeds.to(dtype), "time_ids": batch.time_ids},
    ).sample
    return diffusion.squared_errors(prediction, target, batch.loss_mask)
