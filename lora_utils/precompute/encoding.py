"""Captions and images into the cache. Text encoders and VAE are loaded, used and freed, never both at
once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lora_utils import UserError
from lora_utils.config.data import DataConfig
from lora_utils.data.crops import Crop
from lora_utils.data.decoding import Job, Picture, decode_all, new_job
from lora_utils.data.findings import Finding, noticed, refused
from lora_utils.data.images import ImageError
from lora_utils.data.inspection import InspectedExample
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.text import (
    CAPTIONS_PER_BATCH,
    TextEmbeddings,
    cut_text,
    encode_captions,
    encode_negative,
    too_long,
)
from lora_utils.model.vae import VaePlan, encode_images, plan_encoding, tile_vae
from lora_utils.precompute.cache import Cache, CacheError
from lora_utils.system.device import best_device
from lora_utils.system.device_memory import free_memory, is_memory_full
from lora_utils.system.progress import progress_bar

ImageTask = tuple[InspectedExample, Mapping[str, Crop]]
"""An image, and the crops of it that the cache lacks, by their keys; all of one size."""


def encode_texts(
    cache: Cache,
    base: PretrainedSdxl,
    captions: Mapping[str, str],
    unconditional_key: str,
    max_token_length: int,
    dtype: torch.dtype,
) -> None:
    """Encode captions, and what stands for no caption.

    Args:
        cache: Where to.
        base: Where the encoders come from.
        captions: Key to caption.
        unconditional_key: Key of the record of no caption.
        max_token_length: 77, 150 or 225.
        dtype: Of the encoders and of what is kept.

    Raises:
        CacheError: An encoder's output is not finite.
    """
    pipeline = base.load_text_pipeline(dtype, best_device())
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    if unconditional_key not in cache:
        negative = encode_negative(pipeline, None, max_token_length)
        _add_text(cache, unconditional_key, negative, [], "no caption")

    bar = progress_bar(captions.items(), "captions")
    keys = list(captions)
    for start in range(0, len(keys), CAPTIONS_PER_BATCH):
        batch = keys[start : start + CAPTIONS_PER_BATCH]
        texts = [captions[key] for key in batch]
        # Always a full batch: the last bits of a row can depend on the batch's size, but not on its other
        # rows.
        filled = texts + texts[-1:] * (CAPTIONS_PER_BATCH - len(texts))
        embeddings = encode_captions(pipeline, filled, max_token_length)
        for row, (key, caption) in enumerate(zip(batch, texts, strict=True)):
            findings = _cut_off(tokenizers, caption, max_token_length)
            _add_text(cache, key, embeddings[row], findings, f"caption '{caption[:60]}'")
        bar.update(len(batch))
    bar.close()
    cache.commit()
    # The VAE comes next, and must find the card empty.
    del pipeline
    free_memory()


def _add_text(cache: Cache, key: str, text: TextEmbeddings, findings: Sequence[Finding], source: str) -> None:
    record = {"prompt_embeds": text.prompt_embeds[0], "pooled_prompt_embeds": text.pooled_prompt_embeds[0]}
    try:
        cache.add("texts", key, record, findings)
    except CacheError as error:
        raise CacheError(f"{source}: {error}; set mixed_precision=fp32 for the text encoders") from error


def _cut_off(tokenizers: Sequence[object], caption: str, max_token_length: int) -> list[Finding]:
    count, rest = cut_text(tokenizers, caption, max_token_length)
    return [noticed(*too_long(count, rest))] if rest else []


def encode_image_tasks(
    cache: Cache,
    base: PretrainedSdxl,
    tasks: Sequence[ImageTask],
    config: DataConfig,
    vae_dtype: torch.dtype,
    moments_dtype: torch.dtype,
) -> dict[str, Finding]:
    """Decode, encode and keep; what cannot be used comes back as key to finding, and the rest goes on.

    Args:
        cache: Where to.
        base: Where the VAE comes from.
        tasks: Sorted by size, so that batches are full.
        config: Background, workers, batch size.
        vae_dtype: Of the VAE.
        moments_dtype: Of what is kept.
    """
    refusals: dict[str, Finding] = {}
    if not tasks:
        return refusals
    encoder = _Encoder(base.load_vae(vae_dtype, best_device()), config.vae_batch_size)
    pictures = _pictures(tasks, config, base.vae_scale_factor(), refusals)
    for batch in _batches(pictures, encoder):
        for picture, moments in zip(batch, encoder.encode(batch), strict=True):
            refusal = _add_image(cache, picture, moments.to(moments_dtype))
            if refusal is not None:
                refusals[picture.key] = refusal
    cache.commit()
    # The U-Net comes next, and must find the card empty.
    del encoder
    free_memory()
    return refusals


def _pictures(
    tasks: Sequence[ImageTask], config: DataConfig, scale: int, refusals: dict[str, Finding]
) -> Iterator[Picture]:
    """The tasks' crops, decoded by workers; what cannot be used joins the refusals instead."""

    def jobs() -> Iterator[Job]:
        for number, (inspected, crops) in enumerate(tasks):
            try:
                yield new_job(number, inspected, crops, config, scale)
            except ImageError as error:  # it has vanished or changed meanwhile
                refusals.update(dict.fromkeys(crops, error.finding(inspected.example.source)))

    areas_px = [inspected.area_px for inspected, _ in tasks]
    with progress_bar((), "images", total=sum(len(crops) for _, crops in tasks)) as bar:
        for decoded in decode_all(jobs(), areas_px, config.dataloader_num_workers):
            crops = tasks[decoded.number][1]
            bar.update(len(crops))
            if decoded.refusal is not None:
                refusals.update(dict.fromkeys(crops, decoded.refusal))
            yield from decoded.pictures


def _batches(pictures: Iterable[Picture], encoder: "_Encoder") -> Iterator[list[Picture]]:
    """Pictures of one shape, as many as the encoder takes; fewer where another shape comes, and at the
    end.
    """
    waiting: list[Picture] = []
    for picture in pictures:
        if waiting:
            is_full = len(waiting) == encoder.batch_for(picture.crop)
            if is_full or waiting[0].crop.size != picture.crop.size:
                yield waiting
                waiting = []
        waiting.append(picture)
    if waiting:
        yield waiting


class _Encoder:
    """The VAE with the batch size that fits."""

    def __init__(self, vae: AutoencoderKL, batch: int | None) -> None:
        self._vae = vae
        self._batch = batch
        self._dtype = vae.dtype  # looked up once: the model walks through all its parts for it

    def batch_for(self, crop: Crop) -> int:
        """Images of this size that are encoded together."""
        return self._plan(crop).batch

    def encode(self, pictures: Sequence[Picture]) -> Tensor:
        """Moments of at most a batch of images of one size, (N, 2C, h, w), fp32."""
        crop = pictures[0].crop
        plan = self._plan(crop)
        batch = plan.batch
        tile_vae(self._vae, plan.tile_px)
        try:
            starts = range(0, len(pictures), batch)
            return torch.cat([self._full_batch(pictures[start : start + batch], batch) for start in starts])
        except RuntimeError as error:
            if not is_memory_full(error):
                raise
            if batch == 1:
                width, height = crop.size
                raise UserError(
                    f"the GPU has too little free memory for the VAE at {width}x{height}; end other programs "
                    "on it, lower resolution, or set vae_precision=fp16 and "
                    "pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix"
                ) from error
            # From now on, for all that follow: what did not fit once will not fit again.
            self._batch = batch // 2
        # Outside of the except clause: until it is left, the error holds what did not fit.
        free_memory()
        return self.encode(pictures)

    def _plan(self, crop: Crop) -> VaePlan:
        return plan_encoding(crop.size, self._dtype, self._batch)

    def _full_batch(self, pictures: Sequence[Picture], batch: int) -> Tensor:
        # Always a full batch, for the same reason as with captions.
        missing = batch - len(pictures)
        pixels = np.stack([picture.pixels for picture in pictures] + [pictures[-1].pixels] * missing)
        # [0, 255] to [-1, 1], which the VAE was trained on.
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return encode_images(self._vae, tensor)[: len(pictures)]


def _add_image(cache: Cache, picture: Picture, moments: Tensor) -> Finding | None:
    """Keep one picture's moments; why that was refused, if so."""
    record = {
        "moments": moments,
        "time_ids": torch.tensor(picture.crop.time_ids, dtype=torch.float32),
    }
    if picture.mask is not None:
        # A copy: the array may come from another process' buffer, read-only.
        record["loss_mask"] = torch.from_numpy(picture.mask.copy())[None].to(torch.float32) / 255
    try:
        cache.add("images", picture.key, record, picture.findings)
    except CacheError as error:
        cure = "set vae_precision=fp32, or pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix"
        return refused(f"{error} (the VAE overflowed)", cure)
    return None
