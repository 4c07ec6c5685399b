"""A cache of small random records, one pack each, for tests that copy, damage and join packs."""

from pathlib import Path

import torch

from lora_utils.precompute.cache import Cache, record_key
from lora_utils.precompute.packs import Pack, PackError

MOST = 40
"""Records that there can be, numbered from 0."""


def record(number: int) -> dict[str, torch.Tensor]:
    """The record of this number: two tensors of (3, 4), fp32."""
    generator = torch.Generator().manual_seed(number)
    return {
        name: torch.randn(3, 4, generator=generator) for name in ("prompt_embeds", "pooled_prompt_embeds")
    }


def encode(folder: Path, number: int, join: bool = False) -> None:
    """Add a record to a cache, as precompute does."""
    cache = Cache(folder)
    cache.add("texts", record_key(number=number), record(number), [])
    cache.commit()
    if join:
        cache.compact()


def all_sound(folder: Path) -> bool:
    """Whether every record that the cache has is what was put in."""
    cache = Cache(folder)
    # Keys are hashes, which tell no number: ask for every number that there can be.
    numbers = [number for number in range(MOST) if record_key(number=number) in cache]
    for number in numbers:
        tensors = cache.read(record_key(number=number))
        expected = record(number)
        if not all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items()):
            return False
    return True


def whole(path: Path) -> bool:
    """Whether a pack and all of its records are."""
    try:
        pack = Pack(path)
        return all(pack.is_sound(row) for row in range(len(pack)))
    except PackError:
        return False
