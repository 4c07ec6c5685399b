"""Fills the cache with what it lacks: first captions, then images, never both encoders' weights at once."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lora_utils import cache
from lora_utils.dataset import DataError, Example
from lora_utils.encoders import TextEmbeddings, encode_captions, encode_images, encode_negative
from lora_utils.files import file_hash
from lora_utils.images import frame, open_image
from lora_utils.memory import best_device, free_memory
from lora_utils.progress import progress_bar
from lora_utils.sdxl import BaseModel


@dataclass(frozen=True)
class Precomputed:
    """What precompute found and did."""

    folder: Path
    entries: list[cache.Entry]
    unconditional_key: str
    """Text record of what guidance steers away from when there is no negative prompt."""
    encoded_images: int
    """New in this call; the others were in the cache."""
    encoded_captions: int


def plan_entries(
    examples: list[Example], base: BaseModel, resolution_px: int, validation_split: float, dtype: torch.dtype
) -> list[cache.Entry]:
    """Name every record that the examples need, after all that determines its contents.

    Whether an example is held out depends on its image's bytes alone, so the choice survives new captions and seeds.

    Raises:
        DataError: Every image would be held out.
    """
    hashes = [file_hash(example.path) for example in examples]
    different = sorted(set(hashes))
    held_out = set(different[: max(1, round(len(different) * validation_split))]) if validation_split else set()
    if len(held_out) == len(different):
        raise DataError("validation_split leaves no image to train on; lower it, or add images")
    vae, text = base.vae_identity(), base.text_identity()
    return [
        cache.Entry(
            image_key=cache.record_key(image=image_hash, resolution_px=resolution_px, vae=vae),
            text_key=cache.record_key(caption=example.caption, text=text, dtype=str(dtype)),
            source=str(example.path),
            caption=example.caption,
            held_out=image_hash in held_out,
        )
        for example, image_hash in zip(examples, hashes, strict=True)
    ]


def fill_cache(
    folder: Path, entries: list[cache.Entry], base: BaseModel, resolution_px: int, dtype: torch.dtype
) -> Precomputed:
    """Encode what is missing and write the index. Interrupted, it keeps what it has and goes on next time."""
    captions = {entry.text_key: entry.caption for entry in entries if not cache.has_record(folder, entry.text_key)}
    images = {entry.image_key: entry.source for entry in entries if not cache.has_record(folder, entry.image_key)}
    unconditional_key = cache.record_key(unconditional=True, text=base.text_identity(), dtype=str(dtype))
    if captions or not cache.has_record(folder, unconditional_key):
        _encode_texts(base, captions, unconditional_key, folder, dtype)
    if images:
        _encode_images(base, images, folder, resolution_px)
    cache.write_index(folder, entries)
    return Precomputed(folder, entries, unconditional_key, len(images), len(captions))


def _encode_texts(
    base: BaseModel, captions: dict[str, str], unconditional_key: str, folder: Path, dtype: torch.dtype
) -> None:
    pipeline = base.load_text_pipeline(dtype).to(best_device())
    _write_text(folder, unconditional_key, encode_negative(pipeline, None), "no caption")
    for key, caption in progress_bar(captions.items(), "captions"):
        _write_text(folder, key, encode_captions(pipeline, [caption]), f"caption '{caption}'")
    del pipeline
    free_memory()


def _write_text(folder: Path, key: str, texts: TextEmbeddings, source: str) -> None:
    tensors = {"prompt_embeds": texts.prompt_embeds[0], "pooled_prompt_embeds": texts.pooled_prompt_embeds[0]}
    cache.write_record(folder, key, tensors, source)


def _encode_images(base: BaseModel, images: dict[str, str], folder: Path, resolution_px: int) -> None:
    vae = base.load_vae().to(best_device())
    for key, source in progress_bar(images.items(), "images"):
        framed = frame(open_image(Path(source)), resolution_px)
        moments = encode_images(vae, framed.pixels[None])[0]
        cache.write_record(folder, key, {"moments": moments, "time_ids": framed.time_ids}, source)
    del vae
    free_memory()
