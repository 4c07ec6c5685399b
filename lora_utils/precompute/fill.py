"""Fills the cache with what it lacks: first captions, then images, never both encoders' weights at once."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_utils.config.data import DataConfig
from lora_utils.data.examples import DataError
from lora_utils.data.findings import Finding, fixed, refused, table
from lora_utils.data.inspection import InspectedExample
from lora_utils.model.base import PretrainedSdxl
from lora_utils.precompute.cache import Cache
from lora_utils.precompute.encoding import ImageTask, encode_image_tasks, encode_texts
from lora_utils.precompute.examples import Entry, write_index
from lora_utils.precompute.plan import DataPlan
from lora_utils.system.ownership import own_in_turn

LOGGER = logging.getLogger(__name__)
VERIFIED_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Precomputed:
    """What precompute found and did."""

    cache: Cache
    entries: tuple[Entry, ...]
    """The examples that can be trained on."""
    unconditional_key: str
    """Text record of what guidance steers away from when there is no negative prompt."""
    encoded_images: int
    """Image variants made in this call; the others were in the cache."""
    encoded_captions: int
    findings: list[Finding]
    """What was wrong with the data or the cache, and what was done."""

    def __str__(self) -> str:
        encoded = f"{self.encoded_images} images and {self.encoded_captions} captions encoded now"
        problems = f"\n\n{table(self.findings)}" if self.findings else ""
        return f"{len(self.entries)} examples in {self.folder}: {encoded}, the rest was there{problems}"

    @property
    def folder(self) -> Path:
        """The cache."""
        return self.cache.folder


def fill_cache(folder: Path, plan: DataPlan, base: PretrainedSdxl, config: DataConfig) -> Precomputed:
    """Encode what is missing or damaged and write the index.

    Killed at any moment, it keeps what it has and goes on next time. An image that turns out to be damaged is
    a finding; the rest goes on.

    Args:
        folder: The cache.
        plan: What to encode.
        base: Where the encoders come from.
        config: How images are framed and captions cut.

    Raises:
        DataError: Nothing is left to train on.
    """
    # Two that encode at once would do the same work twice. Whoever has all it needs goes on beside one.
    with own_in_turn(folder, "fills", lambda: _is_filled(folder, plan)):
        return _fill(folder, plan, base, config)


def _is_filled(folder: Path, plan: DataPlan) -> bool:
    cache = Cache(folder)
    return all(key in cache for entry in plan.entries for key in (*entry.keys, plan.unconditional_key))


def _fill(folder: Path, plan: DataPlan, base: PretrainedSdxl, config: DataConfig) -> Precomputed:
    cache = Cache(folder)
    entries = plan.entries
    unconditional_key = plan.unconditional_key
    encoding = plan.encoding
    # What is damaged is forgotten here, and missing a moment later.
    mended = _verify(cache, entries, unconditional_key)

    captions = _missing_captions(cache, entries)
    # The encoders are loaded only where there is something for them to do.
    if captions or unconditional_key not in cache:
        encode_texts(cache, base, captions, unconditional_key, config.max_token_length, encoding.text_dtype)
    tasks = _missing_images(cache, entries, plan.examples)
    refusals = encode_image_tasks(cache, base, tasks, config, encoding.vae_dtype, encoding.moments_dtype)
    cache.compact()

    # Joining packs reads every record once more, and may find one that was damaged meanwhile.
    for entry in entries:
        for key in entry.keys:
            if key not in cache and key not in refusals:
                refusals[key] = refused("damaged in the cache", "run the same command again")
    usable = tuple(entry for entry in entries if not refusals.keys() & {*entry.keys})
    findings = plan.findings + cache.findings + mended + _noted(cache, entries, refusals)
    if all(entry.held_out for entry in usable):
        raise DataError(f"nothing is left to train on; do what the last column says\n{table(findings)}")

    # Last: the index says that all of its records are there.
    write_index(folder, usable)
    encoded_images = sum(key in cache for _, crops in tasks for key in crops)
    return Precomputed(cache, usable, unconditional_key, encoded_images, len(captions), findings)


def _verify(cache: Cache, entries: Sequence[Entry], unconditional_key: str) -> list[Finding]:
    """Read what training will read, so that damage is mended before the U-Net takes the memory.

    Only up to 4 GiB: beyond, every record is checked when training first reads it.
    """
    keys = dict.fromkeys(key for entry in entries for key in entry.keys)
    # A record that several examples share is read once.
    present = [key for key in (*keys, unconditional_key) if key in cache]
    if cache.record_bytes(present) > VERIFIED_BYTES:
        return []
    damaged = set(cache.drop_damaged(present))
    mended = fixed("damaged in the cache", "encoded anew")
    return [mended.of(entry.source) for entry in entries if damaged & {*entry.keys}]


def _missing_captions(cache: Cache, entries: Sequence[Entry]) -> dict[str, str]:
    """Key to caption; equal captions have equal keys, and are encoded once."""
    missing = {}
    for entry in entries:
        for key, caption in zip(entry.text_keys, entry.captions, strict=True):
            if key not in cache:
                missing[key] = caption
    return missing


def _missing_images(
    cache: Cache, entries: Sequence[Entry], examples: Sequence[InspectedExample]
) -> list[ImageTask]:
    """Each image with the crops that nobody has encoded or will encode for another one, sorted by size."""
    tasks = []
    planned: set[str] = set()
    for entry, example in zip(entries, examples, strict=True):
        crops = {}
        for key, crop in zip(entry.image_keys, example.crops, strict=True):
            if key not in cache and key not in planned:
                crops[key] = crop
        # Equal images have equal keys: the first one encodes for all.
        planned |= crops.keys()
        if crops:
            tasks.append((example, crops))
    return sorted(tasks, key=lambda task: task[0].size)  # stable: within a size the order of the examples


def _noted(cache: Cache, entries: Iterable[Entry], refusals: Mapping[str, Finding]) -> list[Finding]:
    """Why images were refused now, and what was noted when the others were encoded, now or in an earlier
    run.
    """
    findings = []
    for entry in entries:
        refusal = next((refusals[key] for key in entry.keys if key in refusals), None)
        if refusal is not None:
            findings.append(refusal.of(entry.source))
            continue
        # Crops of one image share its notes: each is told once.
        notes = dict.fromkeys(note.of(entry.source) for key in entry.keys for note in cache.notes(key))
        findings += notes
    return findings


def warn_of_findings(precomputed: Precomputed, report: Path) -> None:
    """Say what is left out of training, and in which file the remarks on the rest are."""
    refusals = [finding for finding in precomputed.findings if finding.kind == "refused"]
    if refusals:
        LOGGER.warning("%d examples are left out:\n%s", len(refusals), table(refusals))
    remarks = len(precomputed.findings) - len(refusals)
    if remarks:
        LOGGER.warning(
            "%d remarks on what is used, such as cut captions and turned pictures: %s", remarks, report
        )
