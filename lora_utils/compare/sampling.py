"""Images on equal seeds, without and with the adapter."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.lora import ADAPTER, load_lora, read_lora
from lora_utils.model.text import TextEmbeddings, cut_text, encode_captions, encode_negative, too_long
from lora_utils.model.vae import decode_latents, plan_decoding, tile_vae
from lora_utils.system.device import best_device
from lora_utils.system.device_memory import free_memory
from lora_utils.system.progress import progress_bar

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingSettings:
    """Everything that decides an image besides its prompt and seed."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None
    """What to steer away from; None for what the base model takes for no prompt."""
    max_token_length: int = 77
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class Shot:
    """One prompt on one seed."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Picture:
    """A shot that was drawn."""

    shot: Shot
    is_finetuned: bool
    """With the LoRA; else by the base model alone."""
    image: Image.Image


def prompt_numbers(shots: Sequence[Shot]) -> dict[str, int]:
    """Each prompt's number, counted from 1: what files and labels call it."""
    return {prompt: number for number, prompt in enumerate(dict.fromkeys(shot.prompt for shot in shots), 1)}


def draw_pairs(
    base: PretrainedSdxl,
    lora_file: Path,
    shots: Sequence[Shot],
    settings: SamplingSettings,
    adapter_scale: float,
    dtype: torch.dtype,
) -> Iterator[Picture]:
    """Every shot by the base model, then with the LoRA from the same initial noise; yields two for each.

    Text encoders, U-Net and VAE are loaded one after the other and freed in between, so pictures come when
    all is denoised. An interruption ends the denoising alone: what is whole is decoded and yielded first.

    Args:
        base: Where the parts come from.
        lora_file: The adapter; checked before anything is drawn.
        shots: What to draw.
        settings: How to draw it.
        adapter_scale: Strength of the adapter; 0 gives the base model's images, bit for bit.
        dtype: Of text encoders and U-Net; the VAE is fp32.

    Raises:
        KeyboardInterrupt: It came, and all that was drawn until then has been yielded.
    """
    jobs = [(shot, is_finetuned) for shot in shots for is_finetuned in (False, True)]
    texts = _encode_texts(base, shots, settings, dtype)
    # Only now: text encoders and U-Net are never in memory together.
    pipeline = _load_unet(base, lora_file, settings, adapter_scale, dtype)
    latents: list[Tensor] = []
    # At 0 it is left out: a DoRA's magnitudes would stay without a strength.
    is_used = adapter_scale != 0
    is_whole = _denoise(pipeline, jobs, texts, settings, latents, is_used)
    # The latents are on the CPU; the VAE gets the card for itself.
    del pipeline
    free_memory()

    plan = plan_decoding((settings.width, settings.height))
    vae = base.load_vae(plan.dtype, best_device())
    tile_vae(vae, plan.tile_px)
    for drawn, (shot, is_finetuned) in zip(progress_bar(latents, "writing"), jobs, strict=False):
        yield Picture(shot, is_finetuned, _to_image(vae, drawn))
    if not is_whole:
        raise KeyboardInterrupt


def _load_unet(
    base: PretrainedSdxl,
    lora_file: Path,
    settings: SamplingSettings,
    adapter_scale: float,
    dtype: torch.dtype,
) -> StableDiffusionXLPipeline:
    """U-Net, LoRA and scheduler; a LoRA that does not fit costs no drawing."""
    pipeline = base.load_unet_pipeline(dtype, best_device(), base.base_precision)
    if settings.rescale_betas_zero_snr:
        # Lin et al., 2024, section 3.3: begin at the last timestep, as in training.
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    pipeline.vae_scale_factor = base.vae_scale_factor()  # it cannot know without a VAE
    load_lora(pipeline, read_lora(pipeline, lora_file))
    pipeline.unet.set_adapters(ADAPTER, adapter_scale)
    return pipeline


def _denoise(
    pipeline: StableDiffusionXLPipeline,
    jobs: Sequence[tuple[Shot, bool]],
    texts: tuple[dict[str, TextEmbeddings], TextEmbeddings],
    settings: SamplingSettings,
    latents: list[Tensor],
    is_lora_used: bool,
) -> bool:
    """Append the latents of each job; False where an interruption came after some.

    Base and LoRA turn by turn, and not first all by the base: whoever stops half-way has pairs.
    """
    prompts, negative = texts
    try:
        for shot, is_finetuned in progress_bar(jobs, "drawing"):
            _switch_lora(pipeline, is_finetuned and is_lora_used)
            latents.append(draw_latents(pipeline, prompts[shot.prompt], negative, shot.seed, settings))
    except KeyboardInterrupt:  # not kept: its traceback would hold the U-Net
        if not latents:
            raise
        LOGGER.warning("stopping: what is drawn is written first (%d); once more stops at once", len(latents))
        return False
    return True


def _switch_lora(pipeline: StableDiffusionXLPipeline, is_on: bool) -> None:
    if is_on:
        pipeline.unet.enable_adapters()
    else:
        pipeline.unet.disable_adapters()


def _encode_texts(
    base: PretrainedSdxl, shots: Sequence[Shot], settings: SamplingSettings, dtype: torch.dtype
) -> tuple[dict[str, TextEmbeddings], TextEmbeddings]:
    """Each prompt once, whatever its number of seeds, and the other side of the guidance."""
    texts = base.load_text_pipeline(dtype, best_device())
    limit = settings.max_token_length
    prompts = {}
    for prompt in dict.fromkeys(shot.prompt for shot in shots):
        prompts[prompt] = encode_captions(texts, [prompt], limit)
        count, rest = cut_text([texts.tokenizer, texts.tokenizer_2], prompt, limit)
        if rest:
            LOGGER.warning("prompt '%s…': %s, %s", prompt[:40], *too_long(count, rest))
    negative = encode_negative(texts, settings.negative_prompt, limit)
    del texts
    free_memory()
    return prompts, negative


def draw_latents(
    pipeline: StableDiffusionXLPipeline,
    prompt: TextEmbeddings,
    negative: TextEmbeddings,
    seed: int,
    settings: SamplingSettings,
) -> Tensor:
    """Denoise one image as SDXL's own pipeline does, up to the latents.

    Args:
        pipeline: With U-Net and scheduler; encoders and VAE may be absent.
        prompt: One text, N = 1.
        negative: The other side of the guidance, N = 1.
        seed: Of the initial noise, drawn on the CPU so that every machine draws the same.
        settings: Size, steps, guidance.

    Returns:
        Scaled latents, (1, C, h, w), on the CPU.
    """
    device = pipeline.unet.device
    dtype = pipeline.unet.dtype
    latents = pipeline(
        prompt_embeds=prompt.prompt_embeds.to(device, dtype),
        pooled_prompt_embeds=prompt.pooled_prompt_embeds.to(device, dtype),
        negative_prompt_embeds=negative.prompt_embeds.to(device, dtype),
        negative_pooled_prompt_embeds=negative.pooled_prompt_embeds.to(device, dtype),
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    # Kept off the card until the VAE is there: a comparison may have hundreds.
    return latents.cpu()


def _to_image(vae: AutoencoderKL, latents: Tensor) -> Image.Image:
    return VaeImageProcessor().postprocess(decode_latents(vae, latents), output_type="pil")[0]
