"""The on-disk contract between precompute and training.

An example is two records, one of its image and one of its caption; equal captions share theirs. A record is a
safetensors file named after everything that shaped its contents (image bytes and framing, or text; the model that
encoded it), so a changed ingredient means another file and a stale one is never read. ``index.json`` lists the
examples of the current data in order; it is written last.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lora_utils import UserError
from lora_utils.files import write_atomically

SCHEMA = 1
IMAGE_TENSORS = {"moments", "time_ids"}
TEXT_TENSORS = {"prompt_embeds", "pooled_prompt_embeds"}


class CacheError(UserError):
    """A precomputed example is absent, damaged or not finite."""


@dataclass(frozen=True)
class Entry:
    """One precomputed example."""

    image_key: str
    """Name of the image record, from ``record_key``."""
    text_key: str
    """Name of the caption's record."""
    source: str
    """Image file it was made from."""
    caption: str
    held_out: bool
    """Kept out of training, for the held-out loss."""


def record_key(**ingredients: object) -> str:
    """Stable hash of everything that determines a record's contents: 32 hex digits."""
    text = json.dumps({"schema": SCHEMA, **ingredients}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def has_record(folder: Path, key: str) -> bool:
    """Whether a record is in the cache."""
    return _path(folder, key).is_file()


def write_record(folder: Path, key: str, tensors: Mapping[str, Tensor], source: str) -> None:
    """Write one record, refusing NaN and infinity.

    This is the last place where the image behind a bad latent can still be named.

    Args:
        folder: The cache.
        key: From ``record_key``.
        tensors: ``moments`` (2C, h, w) and ``time_ids`` (6,), or ``prompt_embeds`` (L, D) and
            ``pooled_prompt_embeds`` (P,).
        source: Image file or caption, for the message.

    Raises:
        CacheError: A tensor holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CacheError(
                f"{source}: {name} is not finite, so it was not kept; remove the example, or set "
                "pretrained_vae_model_name_or_path to madebyollin/sdxl-vae-fp16-fix"
            )
    write_atomically(_path(folder, key), save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_example(folder: Path, entry: Entry) -> dict[str, Tensor]:
    """Both records of one example: moments, time_ids, prompt_embeds, pooled_prompt_embeds.

    Raises:
        CacheError: A record is absent or damaged.
    """
    return _read(folder, entry.image_key, IMAGE_TENSORS) | read_text(folder, entry.text_key)


def read_text(folder: Path, key: str) -> dict[str, Tensor]:
    """One text record: prompt_embeds, pooled_prompt_embeds.

    Raises:
        CacheError: It is absent or damaged.
    """
    return _read(folder, key, TEXT_TENSORS)


def write_index(folder: Path, entries: list[Entry]) -> None:
    """Say which entries are the current data, in order."""
    content = {"schema": SCHEMA, "entries": [asdict(entry) for entry in entries]}
    write_atomically(folder / "index.json", json.dumps(content, indent=1, ensure_ascii=False).encode())


def read_index(folder: Path) -> list[Entry]:
    """The entries of the current data, in order.

    Raises:
        CacheError: There is no readable index.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise CacheError(f"nothing is precomputed in {folder}; run the precompute stage first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [Entry(**entry) for entry in content["entries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged ({error}); run the precompute stage again") from error


def _read(folder: Path, key: str, expected: set[str]) -> dict[str, Tensor]:
    path = _path(folder, key)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} cannot be read ({error}); delete it and run precompute again") from error
    if set(tensors) != expected:
        raise CacheError(f"{path} does not hold {', '.join(sorted(expected))}; delete it and run precompute again")
    return tensors


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"
