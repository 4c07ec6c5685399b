"""One micro-batch: examples in, the U-Net's errors out. Shared by training and validation.

Shapes as in ``diffusion``; L tokens, D text width, P pooled width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_utils import UserError
from lora_utils.config.training import TrainConfig
from lora_utils.model.base import NoiseSchedule
from lora_utils.precompute.examples import Record
from lora_utils.training import diffusion

PLAIN = TrainConfig()


class ObjectiveError(UserError):
    """The base model cannot be trained in the way that was asked for."""


@dataclass(frozen=True)
class Batch:
    """Examples of one shape with the randomness of this visit."""

    latents: Tensor
    """(B, C, h, w), fp32."""
    noise: Tensor
    """What the target is made of, (B, C, h, w), fp32."""
    input_noise: Tensor
    """What is added to the latents: the same, unless the input is perturbed, (B, C, h, w), fp32."""
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
        """The same on a device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def split(self, size: int) -> "list[Batch]":
        """Batches of at most so many examples, in order."""
        pieces = zip(*(tensor.split(size) for tensor in vars(self).values()), strict=True)
        return [Batch(*piece) for piece in pieces]


def training_schedule(schedule: NoiseSchedule, config: TrainConfig) -> NoiseSchedule:
    """The base model's schedule, as the run uses it in training and validation.

    Raises:
        ObjectiveError: The base predicts epsilon and the schedule should end in pure noise, or has fewer
            timesteps.
    """
    # The schema cannot know the base model's schedule.
    length = len(schedule.alphas_cumprod)
    if max(config.min_timestep + 1, config.max_timestep or 0) > length:
        raise ObjectiveError(f"the base model has {length} timesteps; lower min_timestep and max_timestep")
    if not config.rescale_betas_zero_snr:
        return schedule
    if schedule.prediction_type == "epsilon":
        # Of pure noise, the noise says nothing about the picture: there is nothing to learn at the last
        # timestep.
        raise ObjectiveError(
            "rescale_betas_zero_snr needs a base model that predicts v, and this one predicts epsilon; "
            "set rescale_betas_zero_snr=false, or use noise_offset=0.05 for dark and bright pictures"
        )
    return replace(schedule, alphas_cumprod=diffusion.zero_terminal_snr(schedule.alphas_cumprod))


def draw_visit(
    example: Record,
    generator: torch.Generator,
    schedule: NoiseSchedule,
    timestep: int | None = None,
    latent_mode: Literal["sample", "mean"] = "sample",
    config: TrainConfig = PLAIN,
) -> Batch:
    """A batch of one: fresh latents, noise and timestep (unless given) from the generator.

    What the config adds to plain noise is drawn last, so that it leaves the rest as it was.
    """
    moments = example["moments"]
    if latent_mode == "mean":
        latents = diffusion.mean_latents(moments, schedule.scaling_factor)
    else:
        latents = diffusion.sample_latents(moments, schedule.scaling_factor, generator)
    noise = torch.randn(latents.shape, generator=generator)
    # Drawn also where one is given: the draws after it must not depend on that.
    drawn = _timestep(schedule, config, generator)
    noise = diffusion.offset_noise(noise, config.noise_offset, generator)
    input_noise = diffusion.perturbed_noise(noise, config.input_perturbation, generator)
    # Records without a mask are the usual ones, and smaller by it on disk.
    mask = example.get("loss_mask")
    return Batch(
        latents=latents[None],
        noise=noise[None],
        input_noise=input_noise[None],
        timesteps=drawn if timestep is None else torch.tensor([timestep]),
        prompt_embeds=example["prompt_embeds"][None],
        pooled_prompt_embeds=example["pooled_prompt_embeds"][None],
        time_ids=example["time_ids"][None],
        loss_mask=torch.ones(1, 1, *latents.shape[-2:]) if mask is None else mask[None],
    )


def collate(visits: Sequence[Batch]) -> Batch:
    """Join batches of equal shapes."""
    return Batch(**{name: torch.cat([getattr(visit, name) for visit in visits]) for name in vars(visits[0])})


def training_losses(
    unet: UNet2DConditionModel, batch: Batch, schedule: NoiseSchedule, config: TrainConfig
) -> Tensor:
    """What training averages: each example's masked error, weighted as the config says, (B,), fp32.

    Args:
        unet: With or without adapter; a wrapped one may autocast.
        batch: On the device of the U-Net.
        schedule: From ``training_schedule``.
        config: Of the objective.
    """
    prediction, target = _predict(unet, batch, schedule)
    # In fp32 from here on: squares overflow fp16 above 255.
    losses = diffusion.errors(prediction, target, batch.loss_mask, config.loss_type, config.huber_c)
    if config.snr_gamma is None and not config.debiased_estimation_loss:
        return losses
    snr = diffusion.signal_to_noise(batch.timesteps, schedule.alphas_cumprod.to(batch.timesteps.device))
    if config.snr_gamma is not None:
        return losses * diffusion.min_snr_weights(snr, config.snr_gamma, schedule.prediction_type)
    return losses * diffusion.debiased_weights(snr, schedule.prediction_type)


def denoising_errors(unet: UNet2DConditionModel, batch: Batch, schedule: NoiseSchedule) -> Tensor:
    """Squared error of each example where its mask counts (Ho et al., 2020, eq. 14), (B,), fp32.

    Arguments as in ``training_losses``.
    """
    prediction, target = _predict(unet, batch, schedule)
    return diffusion.squared_errors(prediction, target, batch.loss_mask)


def _timestep(schedule: NoiseSchedule, config: TrainConfig, generator: torch.Generator) -> Tensor:
    lowest = config.min_timestep
    end = config.max_timestep or len(schedule.alphas_cumprod)
    if config.timestep_sampling == "uniform":
        return diffusion.uniform_timestep(lowest, end, generator)
    return diffusion.logit_normal_timestep(lowest, end, config.logit_mean, config.logit_std, generator)


def _predict(unet: UNet2DConditionModel, batch: Batch, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """The U-Net's answer, in its dtype, and what it should have been, fp32; both (B, C, h, w)."""
    alphas_cumprod = schedule.alphas_cumprod.to(batch.latents.device)
    noisy_latents = diffusion.add_noise(batch.latents, batch.input_noise, batch.timesteps, alphas_cumprod)
    target = diffusion.training_target(
        batch.latents, batch.noise, batch.timesteps, alphas_cumprod, schedule.prediction_type
    )
    # The base's first layer: never quantised, while the first parameter may be an adapter's fp32.
    dtype = getattr(unet, "module", unet).conv_in.weight.dtype
    prediction = unet(
        noisy_latents.to(dtype),
        batch.timesteps,
        encoder_hidden_states=batch.prompt_embeds.to(dtype),
        added_cond_kwargs={"text_embeds": batch.pooled_prompt_embeds.to(dtype), "time_ids": batch.time_ids},
    ).sample
    return prediction, target
