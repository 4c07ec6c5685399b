"""The current data's examples: their list, ``index.jsonl``, written when all are encoded, and their
tensors.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_utils import UserError
from lora_utils.config.section import Size
from lora_utils.precompute.cache import Cache
from lora_utils.system.files import write_atomically

INDEX_NAME = "index.jsonl"
INDEX_SCHEMA = 2
Record = dict[str, Tensor]


class IndexFileError(UserError):
    """There is no readable index."""


@dataclass(frozen=True)
class Entry:
    """One precomputed example."""

    source: str
    """The image it was made from."""
    captions: tuple[str, ...]
    """As encoded, one per text key."""
    image_keys: tuple[str, ...]
    """Names of its image records, one per crop, from ``record_key``."""
    text_keys: tuple[str, ...]
    """Names of its caption records."""
    size: Size
    """Width and height of its crops in pixels."""
    repeats: int
    """How often an epoch shows it."""
    held_out: bool
    """Kept out of training, for the held-out loss."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all its records."""
        return self.image_keys + self.text_keys


def write_index(folder: Path, entries: Iterable[Entry]) -> None:
    """Say which examples are the current data, in order, one to a line below a line that counts them."""
    lines = [json.dumps(vars(entry)) for entry in entries]
    # Counted in front: a file that was cut at a line's end would look whole otherwise.
    content = "\n".join([_head(len(lines)), *lines, ""]).encode()
    path = folder / INDEX_NAME
    # A folder that says so already may be read-only.
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def read_index(folder: Path) -> tuple[Entry, ...]:
    """The examples of the current data, in order.

    Raises:
        IndexFileError: There is no readable index.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise IndexFileError(f"nothing is precomputed in {folder}; run the precompute stage first")
    # Only newlines end a line: captions may hold the other characters that Python's splitlines splits at.
    head, *lines = path.read_bytes().split(b"\n")
    # A file that was cut lacks its last newline, or lines.
    if lines[-1:] != [b""] or head != _head(len(lines) - 1).encode():
        raise IndexFileError(f"{path} is damaged or of another version; run the precompute stage again")
    try:
        return tuple(_entry(line) for line in lines[:-1])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IndexFileError(f"{path} is damaged ({error}); run the precompute stage again") from error


def _head(count: int) -> str:
    return json.dumps({"schema": INDEX_SCHEMA, "examples": count})


def _entry(line: bytes) -> Entry:
    fields = json.loads(line)
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Entry(**fields | lists)


@dataclass(frozen=True)
class CachedExamples:
    """Precomputed examples; their tensors are read when a visit asks for them."""

    cache: Cache
    entries: Sequence[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, number: int, image: int = 0, text: int = 0) -> Record:
        """One variant of an example: moments, time_ids, prompt_embeds, pooled_prompt_embeds, perhaps
        loss_mask.
        """
        entry = self.entries[number]
        return self.cache.read(entry.image_keys[image]) | self.cache.read(entry.text_keys[text])

    def draw(self, number: int, generator: torch.Generator) -> Record:
        """A variant of image and caption chosen by the generator, every one with equal chance."""
        entry = self.entries[number]
        image = _choose(len(entry.image_keys), generator)
        return self.read(number, image, _choose(len(entry.text_keys), generator))


def _choose(count: int, generator: torch.Generator) -> int:
    # Where there is nothing to choose nothing is drawn: later draws stay what they are without variants.
    return int(torch.randint(count, (1,), generator=generator)) if count > 1 else 0
