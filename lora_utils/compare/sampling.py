"""Images on equal seeds, without and with the adapter, and the sheet that shows them side by side."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lora_utils.encoders import (
    TextEmbeddings,
    cut_text,
    decode_latents,
    encode_captions,
    encode_negative,
    too_long,
)
from lora_utils.files import write_atomically
from lora_utils.lora import ADAPTER, load_lora, read_lora
from lora_utils.memory import DECODE_GIB, best_device, free_memory, vae_tile
from lora_utils.progress import progress_bar
from lora_utils.sdxl import BaseModel, tile_vae

LOGGER = logging.getLogger(__name__)
SHEET_COLUMNS = 8
TILE_PX = 256
LABEL_PX = 34
GAP_PX = 4


@dataclass(frozen=True)
class Settings:
    """Everything that decides an image besides its prompt and seed."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None
    max_token_length: int = 77
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class Shot:
    """One prompt on one seed."""

    prompt: str
    seed: int


def draw_pairs(
    base: BaseModel,
    lora_file: Path,
    shots: Sequence[Shot],
    settings: Settings,
    adapter_scale: float,
    dtype: torch.dtype,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Every shot by the base model and by the base model with the LoRA, from the same initial noise.

    Text encoders, U-Net and VAE are loaded one after the other and freed in between.

    Args:
        base: Where the parts come from.
        lora_file: Adapter, checked first and loaded when the base model's images are done.
        shots: What to draw.
        settings: How to draw it.
        adapter_scale: Strength of the adapter; 0 gives the base model's images, bit for bit.
        dtype: Of text encoders and U-Net; the VAE is fp32.
    """
    prompts, negative = _encode_texts(base, shots, settings, dtype)
    pipeline = base.load_unet_pipeline(dtype, best_device(), base.base_precision)
    if settings.rescale_betas_zero_snr:  # Lin et al., 2024, section 3.3: begin at the last timestep, as in training
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    pipeline.vae_scale_factor = base.vae_scale_factor()  # it cannot know without a VAE
    weights = read_lora(pipeline, lora_file)
    plain = [
        draw_latents(pipeline, prompts[shot.prompt], negative, shot.seed, settings)
        for shot in progress_bar(shots, "base")
    ]
    load_lora(pipeline, weights)
    pipeline.unet.set_adapters(ADAPTER, adapter_scale)
    tuned = [
        draw_latents(pipeline, prompts[shot.prompt], negative, shot.seed, settings)
        for shot in progress_bar(shots, "LoRA")
    ]
    del pipeline
    free_memory()
    vae = base.load_vae(device=best_device())
    tile_vae(vae, vae_tile((settings.width, settings.height), torch.float32, DECODE_GIB))
    return [_to_image(vae, latents) for latents in plain], [_to_image(vae, latents) for latents in tuned]


def _encode_texts(
    base: BaseModel, shots: Sequence[Shot], settings: Settings, dtype: torch.dtype
) -> tuple[dict[str, TextEmbeddings], TextEmbeddings]:
    texts = base.load_text_pipeline(dtype, best_device())
    limit = settings.max_token_length
    prompts = {prompt: encode_captions(texts, [prompt], limit) for prompt in {shot.prompt for shot in shots}}
    for prompt in prompts:
        count, rest = cut_text([texts.tokenizer, texts.tokenizer_2], prompt, limit)
        if rest:
            LOGGER.warning("prompt '%s…': %s, %s", prompt[:40], *too_long(count, rest))
    negative = encode_negative(texts, settings.negative_prompt, limit)
    del texts
    free_memory()
    return prompts, negative


def draw_latents(
    pipeline: StableDiffusionXLPipeline, prompt: TextEmbeddings, negative: TextEmbeddings, seed: int, settings: Settings
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
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
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
    return latents.cpu()


def save_image(image: Image.Image, path: Path, shot: Shot, settings: Settings, adapter_scale: float) -> None:
    """Write a PNG that carries its settings: JSON under ``lora_utils``, one line under ``parameters``.

    The second is the line that stable-diffusion-webui and its relatives read back.
    """
    facts = asdict(shot) | asdict(settings) | {"adapter_scale": adapter_scale}
    info = PngInfo()
    info.add_itxt("lora_utils", json.dumps(facts, ensure_ascii=False))
    info.add_itxt(
        "parameters",
        f"{shot.prompt}\nNegative prompt: {settings.negative_prompt or ''}\nSteps: {settings.num_inference_steps}, "
        f"CFG scale: {settings.guidance_scale}, Seed: {shot.seed}, "
        f"Size: {image.width}x{image.height}, LoRA scale: {adapter_scale}",
    )
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())


def contact_sheet(shots: Sequence[Shot], rows: dict[str, list[Image.Image]]) -> Image.Image:
    """One picture: under each prompt a column with one tile per row label, at most eight columns to a band."""
    first = next(iter(rows.values()))[0]
    width = max(TILE_PX, first.width // 4)
    height = round(width * first.height / first.width)
    bands = [range(start, min(start + SHEET_COLUMNS, len(shots))) for start in range(0, len(shots), SHEET_COLUMNS)]
    margin, band_px = 96, LABEL_PX + len(rows) * height + 8
    sheet = Image.new("RGB", (margin + min(len(shots), SHEET_COLUMNS) * width, band_px * len(bands)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 13)
    for number, band in enumerate(bands):
        top = number * band_px
        for place, index in enumerate(band):
            left = margin + place * width
            pen.multiline_text((left + 4, top + 2), _fit(shots[index], font, width - 8), "black", font, spacing=1)
            for row, images in enumerate(rows.values()):
                tile = images[index].resize((width - GAP_PX, height - GAP_PX), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left, top + LABEL_PX + row * height))
        for row, label in enumerate(rows):
            pen.text((6, top + LABEL_PX + (row + 0.45) * height), label, "black", font)
    return sheet


def _to_image(vae: AutoencoderKL, latents: Tensor) -> Image.Image:
    return VaeImageProcessor().postprocess(decode_latents(vae, latents), output_type="pil")[0]


def _fit(shot: Shot, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """Prompt and seed on two lines; of the prompt what fits."""
    words, seed = shot.prompt.split(), f"(seed {shot.seed})"
    for kept in range(len(words), 0, -1):
        lines = [""]
        for word in [*words[:kept], *([] if kept == len(words) else ["…"]), *seed.split()]:
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if font.getlength(longer) <= width_px else [*lines, word]
        if len(lines) <= 2:
            return "\n".join(lines)
    return seed
