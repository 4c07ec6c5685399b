"""The mathematics of latent diffusion training, as pure functions.

Shapes: B batch, C latent channels (4), h and w latent height and width, T the number of diffusion timesteps
(1000). Notation follows Ho et al. (2020): x_0 latents, eps noise, a_t the cumulative product of alphas.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_utils.model.base import PredictionType

LossType = Literal["l2", "huber", "smooth_l1"]
MAX_SNR = 1000.0  # as in sd-scripts


def sample_latents(moments: Tensor, scaling_factor: float, generator: torch.Generator) -> Tensor:
    """Draw latents from the VAE posterior kept in the cache (Kingma & Welling, 2014, section 2.4).

    Args:
        moments: Posterior mean and log-variance, (..., 2C, h, w), fp16 or fp32.
        scaling_factor: The VAE's ``scaling_factor``; SDXL's is 0.13025.
        generator: Source of randomness, on the device of ``moments``.

    Returns:
        Latents of roughly unit variance, (..., C, h, w), fp32.
    """
    mean, logvar = moments.float().chunk(2, dim=-3)
    # The same limits as in diffusers' DiagonalGaussianDistribution.
    std = (0.5 * logvar.clamp(-30, 20)).exp()
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + std * noise) * scaling_factor


def mean_latents(moments: Tensor, scaling_factor: float) -> Tensor:
    """The posterior's mean as latents; shapes as in ``sample_latents``."""
    return moments.float().chunk(2, dim=-3)[0] * scaling_factor


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps (Ho et al., 2020, eq. 4).

    Args:
        latents: x_0, (B, C, h, w), fp32.
        noise: eps ~ N(0, I), same shape and dtype.
        timesteps: t in [0, T), (B,), int64.
        alphas_cumprod: a_t for every t, (T,), fp32.

    Returns:
        x_t, (B, C, h, w), fp32.
    """
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def training_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What the U-Net should answer: eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (Salimans & Ho, 2022, app.
    D).

    Shapes as in ``add_noise``; returns (B, C, h, w), fp32.
    """
    if prediction_type == "epsilon":
        return noise
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    # v points along the circle from x_0 to eps on which x_t lies, at right angles to x_t.
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


def signal_to_noise(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """SNR a_t / (1 - a_t) at each timestep, (B,), fp32."""
    alpha = alphas_cumprod[timesteps]
    return alpha / (1 - alpha)


def min_snr_weights(snr: Tensor, snr_gamma: float, prediction_type: PredictionType) -> Tensor:
    """Loss weights min(SNR, gamma) / SNR, or / (SNR + 1) for v (Hang et al., 2023, section 3.4).

    They cap the pull of nearly clean, easy timesteps.

    Args:
        snr: Signal-to-noise ratio of each example, (B,), fp32.
        snr_gamma: The cap; 5 in the paper.
        prediction_type: What the U-Net predicts.

    Returns:
        (B,), fp32, in (0, gamma].
    """
    divisor = snr if prediction_type == "epsilon" else snr + 1
    # min(SNR, gamma) / SNR without 0 / 0 at a terminal SNR of zero.
    return (
        (snr_gamma / divisor).clamp(max=1)
        if prediction_type == "epsilon"
        else snr.clamp(max=snr_gamma) / divisor
    )


def squared_errors(prediction: Tensor, target: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of the masked squared error of each example, (B,), fp32: squares overflow fp16 above 255.

    Args:
        prediction: The U-Net's answer, (B, C, h, w), any float dtype.
        target: From ``training_target``, same shape.
        loss_mask: Weight of each latent, (B, 1, h, w), fp32; ones count everything.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return (errors * loss_mask).mean(dim=(1, 2, 3))


def debiased_weights(snr: Tensor, prediction_type: PredictionType) -> Tensor:
    """Loss weights 1 / sqrt(SNR) for epsilon (Yu et al., 2023), 1 / (SNR + 1) for v.

    Both undo the pull of the nearly clean timesteps. The second, sd-scripts' choice, weighs the error of the
    implied x_0 alike at all timesteps. SNR is capped at 1000, as there.

    Args:
        snr: Signal-to-noise ratio of each example, (B,), fp32.
        prediction_type: What the U-Net predicts.

    Returns:
        (B,), fp32.
    """
    # At the first timesteps the SNR goes to thousands, and a division by its root would forget them.
    snr = snr.clamp(max=MAX_SNR)
    return snr.rsqrt() if prediction_type == "epsilon" else 1 / (snr + 1)


def errors(
    prediction: Tensor, target: Tensor, loss_mask: Tensor, loss_type: LossType, huber_c: float
) -> Tensor:
    """Mean of the masked error of each example, (B,), fp32.

    With e the difference of a latent and c = huber_c: l2 is e^2; huber is 2c (sqrt(e^2 + c^2) - c), which is
    e^2 for small and 2c|e| for large e; smooth_l1 is that over c, so |e| for large e counts 2. These are
    pseudo-Huber losses (Charbonnier et al., 1997), in the form that sd-scripts gives to these names.

    Args:
        prediction: The U-Net's answer, (B, C, h, w), any float dtype.
        target: From ``training_target``, same shape.
        loss_mask: Weight of each latent, (B, 1, h, w), fp32; ones count everything.
        loss_type: Which of the three.
        huber_c: Where the square turns into a line.
    """
    if loss_type == "l2":
        return squared_errors(prediction, target, loss_mask)
    # c (sqrt(e^2 + c^2) - c) is about e^2 / 2 for small e: the factor 2 makes it the square.
    scale = 2 * huber_c if loss_type == "huber" else 2.0
    difference = prediction.float() - target.float()
    elements = scale * ((difference.square() + huber_c**2).sqrt() - huber_c)
    return (elements * loss_mask).mean(dim=(1, 2, 3))


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Noise plus strength times one normal number per channel (Guttenberg, 2023), (C, h, w), fp32.

    The U-Net then learns to move a whole picture's brightness, which plain noise hardly hides.
    """
    if not strength:
        return noise
    return noise + strength * torch.randn(*noise.shape[:-2], 1, 1, generator=generator)


def perturbed_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Noise for the input alone: eps + strength * xi, xi ~ N(0, I) (Ning et al., 2023), (C, h, w), fp32.

    The target stays eps, so the U-Net meets inputs as imperfect as its own answers make them; 0.1 in the
    paper.
    """
    return noise + strength * torch.randn(noise.shape, generator=generator) if strength else noise


def uniform_timestep(lowest: int, end: int, generator: torch.Generator) -> Tensor:
    """A timestep of lowest .. end - 1, each with equal chance, (1,), int64."""
    return torch.randint(lowest, end, (1,), generator=generator)


def logit_normal_timestep(
    lowest: int, end: int, mean: float, std: float, generator: torch.Generator
) -> Tensor:
    """A timestep of lowest .. end - 1 with a normal logit (Esser et al., 2024, section 3.1), (1,), int64."""
    position = torch.sigmoid(mean + std * torch.randn(1, generator=generator))
    # A float next to 1 can round up to the end itself.
    return (lowest + position * (end - lowest)).long().clamp(max=end - 1)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The schedule, scaled to end in pure noise (Lin et al., 2024, algorithm 1), (T,), fp32."""
    # Shifted so that the last root is zero, scaled so that the first stays what it was.
    roots = alphas_cumprod.sqrt()
    first = roots[0]
    last = roots[-1]
    return ((roots - last) * first / (first - last)).square()
