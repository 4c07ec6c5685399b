"""The mathematics of latent diffusion training, as pure functions.

Shapes: B batch, C latent channels (4), h and w latent height and width, T the number of diffusion timesteps
(1000). Notation follows Ho et al. (2020): x_0 latents, eps noise, a_t the cumulative product of alphas.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PredictionType = Literal["epsilon", "v_prediction"]


def visit_generator(seed: int, visit: int) -> torch.Generator:
    """The source of all randomness of one visit to one example: a CPU generator, equal on every machine.

    Visits are counted through the whole run, so a visit stands for a step, a place in its batch and, by
    ``data_order``, an example. seed + visit would make run 1 repeat the noise of run 0; a hash does not.
    """
    return torch.Generator().manual_seed(derived_seed(seed, visit))


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on every one of the numbers (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def data_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which an epoch visits its examples: a permutation of 0 .. size - 1, (size,), int64."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(size)


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
    """What the U-Net should answer: eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (Salimans & Ho, 2022, app. D).

    Shapes as in ``add_noise``; returns (B, C, h, w), fp32.
    """
    if prediction_type == "epsilon":
        return noise
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
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
    return (snr_gamma / divisor).clamp(max=1) if prediction_type == "epsilon" else snr.clamp(max=snr_gamma) / divisor


def squared_errors(prediction: Tensor, target: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of the masked squared error of each example, (B,), fp32: squares overflow fp16 above 255.

    Args:
        prediction: The U-Net's answer, (B, C, h, w), any float dtype.
        target: From ``training_target``, same shape.
        loss_mask: Weight of each latent, (B, 1, h, w), fp32; ones count everything.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return (errors * loss_mask).mean(dim=(1, 2, 3))
