"""The list of the current data's examples: ``index.jsonl``, one example to a line, written when all are encoded."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_utils import UserError
from lora_utils.precompute.cache import Cache
from lora_utils.system.files import write_atomically

INDEX_NAME = "index.jsonl"
INDEX_SCHEMA = 2
SCANNED_BYTES = 2**20
NEWLINE = 10


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
    size: tuple[int, int]
    """Width and height of its crops in pixels."""
    repeats: int
    """How often an epoch shows it."""
    held_out: bool
    """Kept out of training, for the held-out loss."""


class Index(Sequence[Entry]):
    """Examples that are parsed when they are asked for: 100,000 of them open in a moment."""

    def __init__(self, content: bytes) -> None:
        """Take an index file's bytes: a line that describes it, then one line per example."""
        self.content = content
        parts = range(0, len(content), SCANNED_BYTES)
        ends = [
            np.flatnonzero(np.frombuffer(content[at : at + SCANNED_BYTES], np.uint8) == NEWLINE) + at
            for at in parts
        ]
        self._ends = np.concatenate([np.empty(0, np.int64), *ends])

    @property
    def head(self) -> bytes:
        """The line that describes it."""
        return self.content[: int(self._ends[0])] if len(self._ends) else b""

    def __len__(self) -> int:
        return max(0, len(self._ends) - 1)

    def __getitem__(self, number: int) -> Entry:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        fields = json.loads(self.content[int(self._ends[number]) + 1 : int(self._ends[number + 1])])
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return Entry(**fields | lists)


def encode_index(entries: Iterable[Entry]) -> Index:
    """An index in memory."""
    lines = [json.dumps(vars(entry)) for entry in entries]
    return Index("\n".join([_head(len(lines)), *lines, ""]).encode())


def write_index(folder: Path, index: Index) -> None:
    """Say which examples are the current data, in order; a folder that says so already may be read-only."""
    path = folder / INDEX_NAME
    if not path.is_file() or path.read_bytes() != index.content:
        write_atomically(path, index.content)


def read_index(folder: Path) -> Index:
    """The examples of the current data, in order.

    Raises:
        IndexFileError: There is no readable index.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise IndexFileError(f"nothing is precomputed in {folder}; run the precompute stage first")
    index = Index(path.read_bytes())
    if index.head != _head(len(index)).encode():
        raise IndexFileError(f"{path} is damaged or of another version; run the precompute stage again")
    return index


def _head(count: int) -> str:
    return json.dumps({"schema": INDEX_SCHEMA, "examples": count})


Record = dict[str, Tensor]


@dataclass(frozen=True)
class CachedExamples:
    """Precomputed examples; their tensors are read when a visit asks for them."""

    cache: Cache
    entries: Sequence[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, number: int, image: int = 0, text: int = 0) -> Record:
        """One variant of an example: moments, time_ids, prompt_embeds, pooled_prompt_embeds, perhaps loss_mask."""
        entry = self.entries[number]
        return self.cache.read(entry.image_keys[image]) | self.cache.read(entry.text_keys[text])

    def draw(self, number: int, generator: torch.Generator) -> Record:
        """A variant of image and caption chosen by the generator, every one with equal chance."""
        entry = self.entries[number]
        image = _choose(len(entry.image_keys), generator)
        return self.read(number, image, _choose(len(entry.text_keys), generator))


def _choose(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator)) if count > 1 else 0
