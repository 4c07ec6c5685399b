"""Captions into the cache: both text encoders are loaded, used and freed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lora_utils import UserError
from lora_utils.config.data import DataConfig
from lora_utils.data.crops import Crop
from lora_utils.data.decoding import Job, Picture, decode_all
from lora_utils.data.findings import Finding, refusal
from lora_utils.data.images import ImageError
from lora_utils.data.inspection import ALPHA, InspectedExample, read_unchanged
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.text import (
    CAPTIONS_PER_BATCH,
    TextEmbeddings,
    cut_text,
    encode_captions,
    encode_negative,
    too_long,
)
from lora_utils.model.vae import encode_images, tile_vae, vae_batch, vae_tile
from lora_utils.precompute.cache import Cache, CacheError
from lora_utils.system.device import best_device, free_memory
from lora_utils.system.progress import progress_bar


@dataclass(frozen=True)
class ImageTask:
    """The crops of one image that the cache lacks."""

    one: InspectedExample
    crops: Mapping[str, Crop]
    """Key to crop; all of one size."""


@dataclass(frozen=True)
class _Cut:
    """One crop on its way through the VAE."""

    key: str
    crop: Crop
    pixels: np.ndarray
    mask: np.ndarray | None
    notes: list[list[str]]


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
    refused: dict[str, Finding] = {}
    if not tasks:
        return refused
    encoder = _Encoder(base.load_vae(vae_dtype, best_device()), config.vae_batch_size)
    bar = progress_bar((), "images", total=sum(len(task.crops) for task in tasks))
    scale = base.vae_scale_factor()
    waiting: list[_Cut] = []
    for task, picture in _pictures(tasks, config, scale, refused):
        bar.update(len(task.crops))
        if picture.refusal is not None:
            refused |= {key: refusal(task.one.example.source, picture.refusal) for key in task.crops}
            continue
        for cut in _cuts(task, picture):
            if waiting and (
                waiting[0].crop.size != cut.crop.size or len(waiting) == encoder.batch_for(cut.crop)
            ):
                _keep(cache, encoder, waiting, moments_dtype, refused)
                waiting = []
            waiting.append(cut)
    if waiting:
        _keep(cache, encoder, waiting, moments_dtype, refused)
    bar.close()
    cache.commit()
    del encoder
    free_memory()
    return refused


class _Encoder:
    """The VAE with the batch size that fits."""

    def __init__(self, vae: AutoencoderKL, batch: int | None) -> None:
        self._vae, self._batch = vae, batch
        self._dtype = vae.dtype  # looked up once: the model walks through all its parts for it

    def batch_for(self, crop: Crop) -> int:
        """Images of this size that are encoded together."""
        area_px, tile = crop.size[0] * crop.size[1], vae_tile(crop.size, self._dtype)
        return self._batch or vae_batch(min(area_px, tile**2) if tile else area_px, self._dtype)

    def encode(self, cuts: Sequence[_Cut]) -> Tensor:
        """Moments of at most a batch of images of one size, (N, 2C, h, w), fp32."""
        batch = self.batch_for(cuts[0].crop)
        tile_vae(self._vae, vae_tile(cuts[0].crop.size, self._dtype))
        try:
            return torch.cat(
                [self._full_batch(cuts[at : at + batch], batch) for at in range(0, len(cuts), batch)]
            )
        except torch.OutOfMemoryError as error:
            if batch == 1:
                width, height = cuts[0].crop.size
                raise UserError(
                    f"the GPU has too little free memory for the VAE at {width}x{height}; end other programs on it, "
                    "lower resolution, or set vae_precision=fp16 and "
                    "pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix"
                ) from error
            self._batch = batch // 2
        free_memory()
        return self.encode(cuts)

    def _full_batch(self, cuts: Sequence[_Cut], batch: int) -> Tensor:
        # Always a full batch: the last bits of a row can depend on the batch's size, but not on its other rows.
        pixels = np.stack([cut.pixels for cut in cuts] + [cuts[-1].pixels] * (batch - len(cuts)))
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return encode_images(self._vae, tensor)[: len(cuts)]


def _pictures(
    tasks: Sequence[ImageTask], config: DataConfig, scale: int, refused: dict[str, Finding]
) -> Iterator[tuple[ImageTask, Picture]]:
    def jobs() -> Iterator[Job]:
        for number, task in enumerate(tasks):
            try:
                content, mask = read_unchanged(task.one)
            except ImageError as error:
                refused.update({key: refusal(task.one.example.source, error) for key in task.crops})
                continue
            crops, is_mask = tuple(task.crops.values()), task.one.mask_hash == ALPHA
            yield Job(number, content, crops, config.alpha_background, mask, is_mask, scale)

    for picture in decode_all(jobs(), [task.one.area_px for task in tasks], config.dataloader_num_workers):
        yield tasks[picture.number], picture


def _cuts(task: ImageTask, picture: Picture) -> Iterator[_Cut]:
    notes = [[problem, action, "fixed"] for problem, action in picture.notices]
    masks = picture.masks or [None] * len(picture.pixels)
    for (key, crop), pixels, mask in zip(task.crops.items(), picture.pixels, masks, strict=True):
        yield _Cut(key, crop, pixels, mask, notes)


def _keep(
    cache: Cache, encoder: _Encoder, cuts: Sequence[_Cut], dtype: torch.dtype, refused: dict[str, Finding]
) -> None:
    for cut, moments in zip(cuts, encoder.encode(cuts), strict=True):
        record = {
            "moments": moments.to(dtype),
            "time_ids": torch.tensor(cut.crop.time_ids, dtype=torch.float32),
        }
        if cut.mask is not None:
            record["loss_mask"] = torch.from_numpy(cut.mask.copy())[None].to(torch.float32) / 255
        try:
            cache.add("images", cut.key, record, cut.notes)
        except CacheError as error:
            cure = (
                "set vae_precision=fp32, or pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix"
            )
            refused[cut.key] = refusal("", f"{error} (the VAE overflowed); {cure}")


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
        _add(cache, unconditional_key, encode_negative(pipeline, None, max_token_length), 0, [], "no caption")
    bar = progress_bar(captions.items(), "captions")
    for batch in _batches(list(captions), CAPTIONS_PER_BATCH):
        texts = [captions[key] for key in batch]
        # Always a full batch: the last bits of a row can depend on the batch's size, but not on its other rows.
        embeddings = encode_captions(
            pipeline, texts + texts[-1:] * (CAPTIONS_PER_BATCH - len(texts)), max_token_length
        )
        for place, (key, caption) in enumerate(zip(batch, texts, strict=True)):
            notes = _notes(tokenizers, caption, max_token_length)
            _add(cache, key, embeddings, place, notes, f"caption '{caption[:60]}'")
        bar.update(len(batch))
    bar.close()
    cache.commit()
    del pipeline
    free_memory()


def _add(
    cache: Cache, key: str, texts: TextEmbeddings, place: int, notes: list[list[str]], source: str
) -> None:
    record = {
        "prompt_embeds": texts.prompt_embeds[place],
        "pooled_prompt_embeds": texts.pooled_prompt_embeds[place],
    }
    try:
        cache.add("texts", key, record, notes)
    except CacheError as error:
        raise CacheError(f"{source}: {error}; set mixed_precision=fp32 for the text encoders") from error


def _notes(tokenizers: Sequence[object], caption: str, max_token_length: int) -> list[list[str]]:
    count, rest = cut_text(tokenizers, caption, max_token_length)
    return [[*too_long(count, rest), "noticed"]] if rest else []


def _batches(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
