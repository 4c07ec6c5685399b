"""Fills the cache with what it lacks: first captions, then images, never both encoders' weights at once."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from lora_utils.config.data import DataConfig
from lora_utils.config.schema import RunConfig
from lora_utils.data.examples import DataError
from lora_utils.data.findings import Finding, Kind, refusal, table
from lora_utils.data.inspection import InspectedExample, held_out_hashes, require_training
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.vae import vae_tile
from lora_utils.precompute.cache import Cache, record_key
from lora_utils.precompute.encoding import ImageTask, encode_image_tasks, encode_texts
from lora_utils.precompute.examples import Entry, Index, encode_index, write_index

LOGGER = logging.getLogger(__name__)

VERIFIED_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Encoding:
    """What decides the contents of records besides the data."""

    text_dtype: torch.dtype
    """fp32, fp16 or bf16: what the U-Net computes in."""
    vae_dtype: torch.dtype
    """fp32, or fp16 for a VAE made for it."""

    @property
    def moments_dtype(self) -> torch.dtype:
        """fp16 where the U-Net computes in half precision; bf16 has too few digits for latents."""
        return torch.float32 if self.text_dtype == torch.float32 else torch.float16


@dataclass(frozen=True)
class Precomputed:
    """What precompute found and did."""

    cache: Cache
    entries: Index
    """The examples that can be trained on."""
    unconditional_key: str
    """Text record of what guidance steers away from when there is no negative prompt."""
    encoded_images: int
    """Image variants made in this call; the others were in the cache."""
    encoded_captions: int
    findings: list[Finding]
    """What was wrong with the data or the cache, and what was done."""

    def __str__(self) -> str:
        counts = f"{self.encoded_images} images and {self.encoded_captions} captions encoded now, the rest was there"
        problems = f"\n\n{table(self.findings)}" if self.findings else ""
        return f"{len(self.entries)} examples in {self.folder}: {counts}{problems}"

    @property
    def folder(self) -> Path:
        """The cache."""
        return self.cache.folder


def plan_entries(
    examined: Sequence[InspectedExample], base: PretrainedSdxl, config: DataConfig, encoding: Encoding
) -> list[Entry]:
    """Name every record that the examples need, after all that determines its contents."""
    held_out = held_out_hashes(examined, config.validation_split)
    vae, text_settings = base.vae_identity(), _text_settings(base, config, encoding)
    precisions = [str(encoding.vae_dtype), str(encoding.moments_dtype)]
    entries = []
    for one in examined:
        shared = {"image": one.content_hash, "mask": one.mask_hash, "vae": vae, "precisions": precisions}
        shared["background"] = config.alpha_background if one.has_alpha else None
        shared["tile"] = vae_tile(one.size, encoding.vae_dtype)
        entries.append(
            Entry(
                source=one.example.source,
                captions=one.captions,
                image_keys=tuple(record_key(**shared, crop=vars(crop)) for crop in one.crops),
                text_keys=tuple(record_key(caption=caption, **text_settings) for caption in one.captions),
                size=one.size,
                repeats=one.example.repeats,
                held_out=one.content_hash in held_out,
            )
        )
    return entries


def fill_cache(
    folder: Path,
    examined: Sequence[InspectedExample],
    findings: list[Finding],
    base: PretrainedSdxl,
    config: DataConfig,
    encoding: Encoding,
) -> Precomputed:
    """Encode what is missing or damaged and write the index.

    Killed at any moment, it keeps what it has and goes on next time. An image that turns out to be damaged is a
    finding; the rest goes on.

    Args:
        folder: The cache.
        examined: What to encode.
        findings: What is known to be wrong already.
        base: Where the encoders come from.
        config: How images are framed and captions cut.
        encoding: Precisions.

    Raises:
        DataError: Nothing is left to train on.
    """
    require_training(examined, findings, config.validation_split)
    cache = Cache(folder)
    entries = plan_entries(examined, base, config, encoding)
    unconditional_key = record_key(unconditional=True, **_text_settings(base, config, encoding))
    mended = _verify(cache, entries, unconditional_key)
    captions = _missing_captions(cache, entries)
    if captions or unconditional_key not in cache:
        encode_texts(cache, base, captions, unconditional_key, config.max_token_length, encoding.text_dtype)
    tasks = _missing_images(cache, entries, examined)
    refused = encode_image_tasks(cache, base, tasks, config, encoding.vae_dtype, encoding.moments_dtype)
    cache.compact()
    lost = {
        key: refusal("", "damaged in the cache; run the same command again")
        for entry in entries
        for key in (*entry.image_keys, *entry.text_keys)
        if key not in cache and key not in refused
    }
    refused |= lost
    usable = encode_index(
        entry for entry in entries if not refused.keys() & {*entry.image_keys, *entry.text_keys}
    )
    found = findings + cache.findings + mended + _noted(cache, entries, refused)
    if all(entry.held_out for entry in usable):
        raise DataError(f"nothing is left to train on; do what the last column says\n{table(found)}")
    write_index(folder, usable)
    made = sum(key in cache for task in tasks for key in task.crops)
    return Precomputed(cache, usable, unconditional_key, made, len(captions), found)


def _text_settings(base: PretrainedSdxl, config: DataConfig, encoding: Encoding) -> dict[str, object]:
    return {
        "text": base.text_identity(),
        "dtype": str(encoding.text_dtype),
        "max_token_length": config.max_token_length,
    }


def _verify(cache: Cache, entries: Sequence[Entry], unconditional_key: str) -> list[Finding]:
    """Read what training will read, so that damage is mended before the U-Net takes the memory.

    Only up to 4 GiB: beyond, every record is checked when training first reads it.
    """
    keys = dict.fromkeys(key for entry in entries for key in (*entry.image_keys, *entry.text_keys))
    present = [key for key in (*keys, unconditional_key) if key in cache]
    if cache.record_bytes(present) > VERIFIED_BYTES:
        return []
    damaged = set(cache.drop_damaged(present))
    return [
        Finding(entry.source, "damaged in the cache", "encoded anew", "fixed")
        for entry in entries
        if damaged & {*entry.image_keys, *entry.text_keys}
    ]


def _missing_captions(cache: Cache, entries: Sequence[Entry]) -> dict[str, str]:
    return {
        key: caption
        for entry in entries
        for key, caption in zip(entry.text_keys, entry.captions, strict=True)
        if key not in cache
    }


def _missing_images(
    cache: Cache, entries: Sequence[Entry], examined: Sequence[InspectedExample]
) -> list[ImageTask]:
    tasks, planned = [], set()
    for entry, one in zip(entries, examined, strict=True):
        crops = {
            key: crop
            for key, crop in zip(entry.image_keys, one.crops, strict=True)
            if key not in cache and key not in planned
        }
        planned |= crops.keys()
        if crops:
            tasks.append(ImageTask(one, crops))
    return sorted(
        tasks, key=lambda task: next(iter(task.crops.values())).size
    )  # stable: batches of one shape


def _noted(cache: Cache, entries: Iterable[Entry], refused: dict[str, Finding]) -> list[Finding]:
    """Why images were refused now, and what was noted when the others were encoded, now or in an earlier run."""
    found = []
    for entry in entries:
        if problem := next(
            (refused[key] for key in (*entry.image_keys, *entry.text_keys) if key in refused), None
        ):
            found.append(replace(problem, source=entry.source))
            continue
        noted = {
            tuple(note): None for key in (*entry.image_keys, *entry.text_keys) for note in cache.notes(key)
        }
        found += [Finding(entry.source, problem, action, cast(Kind, kind)) for problem, action, kind in noted]
    return found


def warn_of_findings(config: RunConfig, found: Precomputed) -> None:
    """Say what is left out of training, and where the remarks on the rest are."""
    refused = [finding for finding in found.findings if finding.kind == "refused"]
    if refused:
        LOGGER.warning("%d examples are left out:\n%s", len(refused), table(refused))
    if len(found.findings) > len(refused):
        count, report = len(found.findings) - len(refused), config.paths.output_dir / "data_report.csv"
        LOGGER.warning(
            "%d remarks on what is used, such as cut captions and turned pictures: %s", count, report
        )


def cache_folder(config: RunConfig) -> Path:
    return config.paths.precompute_dir or config.paths.output_dir / "precomputed"
