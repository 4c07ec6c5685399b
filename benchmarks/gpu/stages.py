"""What a run does besides training, on models with random weights: encode, sample, decode, save and load."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from benchmarks.gpu.cases import Stage
from benchmarks.gpu.device import Settings, measure, peaks, synchronise
from benchmarks.gpu.peers import TOKENS, random_batch, random_unet, random_vae, text_encoders
from lora_utils.config.training import LoraConfig
from lora_utils.model import lora
from lora_utils.model.vae import tile_vae
from lora_utils.system.device import DTYPES


def vae_encode(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Images through the VAE's encoder."""
    vae = random_vae(DTYPES[stage.dtype], settings.device)
    tile_vae(vae, stage.tile_px)
    shape = (stage.batch, 3, stage.side_px, stage.side_px)
    pixels = torch.randn(shape, device=settings.device, dtype=DTYPES[stage.dtype])
    return _measured(lambda: vae.encode(pixels), settings, stage.batch)


def vae_decode(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Latents through the VAE's decoder."""
    vae = random_vae(DTYPES[stage.dtype], settings.device)
    latents = random_batch(stage.batch, stage.side_px, settings.device).latents.to(DTYPES[stage.dtype])
    return _measured(lambda: vae.decode(latents), settings, stage.batch)


def captions(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Captions of 77 tokens through both text encoders."""
    encoders = text_encoders(DTYPES[stage.dtype], settings.device)
    ids = torch.randint(100, (stage.batch, TOKENS), device=settings.device)
    return _measured(
        lambda: [encoder(ids, output_hidden_states=True) for encoder in encoders], settings, stage.batch
    )


def sampling(stage: Stage, settings: Settings) -> dict[str, Any]:
    """One denoising step with an adapter; batch 2 is one picture with guidance."""
    unet = random_unet("fp16", DTYPES[stage.dtype], settings.device).eval()
    lora.add_lora(unet, LoraConfig(rank=32, target_modules=["attn"]), seed=0)
    unet.to(DTYPES[stage.dtype])  # as pipelines load adapters
    batch = random_batch(stage.batch, stage.side_px, settings.device)
    added = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.time_ids.to(DTYPES[stage.dtype])}
    latents = batch.latents.to(DTYPES[stage.dtype])
    return _measured(
        lambda: unet(latents, 500, batch.prompt_embeds.to(latents.dtype), added_cond_kwargs=added),
        settings,
        1,
    )


def save_and_load(stage: Stage, settings: Settings) -> dict[str, Any]:
    """An adapter of rank 32 into a file and back into a pipeline."""
    unet = random_unet("fp16", DTYPES[stage.dtype], settings.device)
    lora.add_lora(unet, LoraConfig(rank=32, target_modules=["attn"]), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        file = lora.save_lora(unet, Path(folder))
        saved = time.perf_counter()
        del unet
        unet = random_unet("fp16", DTYPES[stage.dtype], settings.device)
        absent = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        pipeline = StableDiffusionXLPipeline(
            **dict.fromkeys(absent), unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False
        )
        deleted = time.perf_counter()
        lora.load_lora(pipeline, lora.read_lora(pipeline, file))
        synchronise(settings)
        loaded = time.perf_counter()
        mib = file.stat().st_size / 2**20
    return {"save_seconds": saved - started, "load_seconds": loaded - deleted, "file_mib": mib, **peaks()}


def _measured(run: Callable[[], object], settings: Settings, examples: int) -> dict[str, Any]:
    with torch.no_grad():
        figures = measure(run, settings)
    return figures | {"per_second": 1000 * examples / figures["ms"]}
