"""Pixels to moments, captions to embeddings: everything that is computed once.

Shapes: N images or captions, C latent channels (4), h and w latent height and width, L tokens (77),
D width of both text encoders together (2048 in SDXL), P pooled width (1280).
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor


@dataclass(frozen=True)
class TextEmbeddings:
    """What the U-Net is told about a text."""

    prompt_embeds: Tensor
    """Last but one hidden states of both encoders side by side, (N, L, D)."""
    pooled_prompt_embeds: Tensor
    """Projected pooled output of the second encoder, (N, P)."""

    def __getitem__(self, index: int) -> "TextEmbeddings":
        """One text, still with a leading 1."""
        return TextEmbeddings(self.prompt_embeds[index : index + 1], self.pooled_prompt_embeds[index : index + 1])


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Posterior mean and log-variance of images.

    Args:
        vae: In fp32: SDXL's own VAE overflows in fp16.
        pixels: (N, 3, 8h, 8w), fp32, in [-1, 1], on any device.

    Returns:
        Moments, (N, 2C, h, w), fp32, on the CPU.
    """
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters.float().cpu()


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images from latents, as SDXL's pipeline decodes them.

    Args:
        vae: In fp32.
        latents: (N, C, h, w), scaled, on any device.

    Returns:
        Pixels, (N, 3, 8h, 8w), fp32, in [-1, 1] but for overshoot, on the CPU.
    """
    latents = latents.to(vae.device, vae.dtype)
    return vae.decode(latents / vae.config.scaling_factor).sample.float().cpu()


@torch.no_grad()
def encode_captions(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> TextEmbeddings:
    """Embed texts with both encoders, by the pipeline's own ``encode_prompt``; results are on the CPU."""
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    return TextEmbeddings(embeds.cpu(), pooled.cpu())


@torch.no_grad()
def encode_negative(pipeline: StableDiffusionXLPipeline, negative_prompt: str | None) -> TextEmbeddings:
    """The unconditional side of guidance, N = 1: zeros without a negative prompt if the base model says so."""
    _, embeds, _, pooled = pipeline.encode_prompt("", negative_prompt=negative_prompt)
    return TextEmbeddings(embeds.cpu(), pooled.cpu())
