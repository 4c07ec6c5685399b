"""Many records of one layout in one file: a safetensors file whose tensors are stacked, one row per record.

Beside the records' own tensors it holds ``keys`` (n, 16) and ``hashes`` (n, 32), both uint8, so a file opens
without its data being read, and a row is checked by its SHA-256 when it is. Files are written once and never
changed.
"""

import hashlib
import json
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, get_args

import torch
from torch import Tensor

from lora_utils import UserError
from lora_utils.data.findings import Finding, Kind
from lora_utils.system.files import commit_file
from lora_utils.system.portable import open_descriptor, read_at

KEY_BYTES = 16
HASH_BYTES = 32
TENSOR_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in TENSOR_DTYPES.items()}
GREATEST_HEADER = 100 * 2**20
Notes = dict[str, list[Finding]]
"""Key in hex to what was found wrong with the record's image or caption; their sources are not kept."""


class PackError(UserError):
    """A pack or one of its rows is damaged."""


@dataclass(frozen=True)
class Layout:
    """Name to dtype and shape of one record's tensors, in alphabetical order of the names."""

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]

    @staticmethod
    def of(record: Mapping[str, Tensor]) -> "Layout":
        """The layout of a record."""
        return Layout(
            tuple((name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in sorted(record.items()))
        )

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor of a record."""
        return {name: TENSOR_DTYPES[dtype].itemsize * math.prod(shape) for name, dtype, shape in self.tensors}

    @property
    def row_bytes(self) -> int:
        """Bytes of a record."""
        return sum(self.sizes().values())


@dataclass(frozen=True)
class Row:
    """A record on its way into a pack."""

    key: bytes
    digest: bytes
    part: Callable[[str], bytes]
    """The bytes of one of its tensors."""


def new_row(key: bytes, record: Mapping[str, Tensor]) -> Row:
    """A record as bytes, hashed."""
    parts = {}
    for name, tensor in record.items():
        # Through uint8, because numpy has no bf16.
        parts[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Row(key, digest(key, Layout.of(record), parts), parts.__getitem__)


def digest(key: bytes, layout: Layout, parts: Mapping[str, bytes]) -> bytes:
    """SHA-256 of a record's bytes, then its layout and key: a row moved to another key or shape does not
    pass.
    """
    hasher = hashlib.sha256()
    for name, _, _ in layout.tensors:
        hasher.update(parts[name])
    # Behind the data, so that benchmarks can hash many equal rows without reading them again.
    hasher.update(repr(layout.tensors).encode() + key)
    return hasher.digest()


def write_pack(path: Path, layout: Layout, rows: Sequence[Row], notes: Notes) -> None:
    """Write records of one layout; whole or not at all, one row in memory at a time."""

    def write(file: IO[bytes]) -> None:
        file.write(encode_header(layout, len(rows), _as_json(notes)))
        # Keys and hashes together in front: a pack is opened by reading its beginning alone.
        file.write(b"".join(row.key for row in rows))
        file.write(b"".join(row.digest for row in rows))
        for name, _, _ in layout.tensors:
            for row in rows:
                file.write(row.part(name))

    commit_file(path, write)


def encode_header(layout: Layout, count: int, notes: object) -> bytes:
    """The safetensors header of a pack: its length in 8 bytes, then JSON; notes are what JSON can hold."""
    text = json.dumps(notes)
    metadata = {"notes": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    fixed = (("keys", "U8", (KEY_BYTES,)), ("hashes", "U8", (HASH_BYTES,)))
    for name, dtype, shape in (*fixed, *layout.tensors):
        size = count * math.prod(shape) * (TENSOR_DTYPES[dtype].itemsize if dtype in TENSOR_DTYPES else 1)
        header[name] = {"dtype": dtype, "shape": [count, *shape], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    # safetensors wants its data aligned to 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Pack:
    """An open pack. Rows are read from disk when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            PackError: It is damaged, or the file is not as long as it says.
        """
        self.path = path
        self._descriptor = open_descriptor(path)
        # Closed with the object, however it goes: a cache of many packs must not leak descriptors.
        self.close = weakref.finalize(self, os.close, self._descriptor)
        """Let go of the file, so that Windows lets it be renamed or deleted; nothing can be read after."""
        try:
            self._read_header()
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            self.close()
            raise PackError(f"{path} is damaged ({type(error).__name__}: {error})") from error

    def __len__(self) -> int:
        return self._count

    def keys(self) -> list[bytes]:
        """The records' keys, in the order of the rows."""
        keys = read_at(self._descriptor, self._count * KEY_BYTES, self._begin)
        return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]

    def row(self, number: int) -> Row:
        """A record as it stands in the file, for copying; not checked."""
        hashes = self._begin + self._count * KEY_BYTES
        key = read_at(self._descriptor, KEY_BYTES, self._begin + number * KEY_BYTES)
        stored = read_at(self._descriptor, HASH_BYTES, hashes + number * HASH_BYTES)
        return Row(key, stored, lambda name: self._part(name, number))

    def read(self, number: int) -> dict[str, Tensor]:
        """A record's tensors.

        Raises:
            PackError: Its bytes are not those that were written, or it holds NaN or infinity.
        """
        row, parts = self._row_and_parts(number)
        if digest(row.key, self.layout, parts) != row.digest:
            raise PackError(f"{self.path}: record {row.key.hex()} is damaged")
        tensors = {
            # A bytearray, because torch wants memory that it may write to.
            name: torch.frombuffer(bytearray(parts[name]), dtype=TENSOR_DTYPES[dtype]).reshape(shape)
            for name, dtype, shape in self.layout.tensors
        }
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise PackError(f"{self.path}: record {row.key.hex()} is not finite")
        return tensors

    def is_sound(self, number: int) -> bool:
        """Whether a record's bytes are those that were written."""
        row, parts = self._row_and_parts(number)
        return digest(row.key, self.layout, parts) == row.digest

    def _row_and_parts(self, number: int) -> tuple[Row, dict[str, bytes]]:
        row = self.row(number)
        return row, {name: row.part(name) for name, _, _ in self.layout.tensors}

    def _part(self, name: str, number: int) -> bytes:
        start, size = self._offsets[name]
        return read_at(self._descriptor, size, start + number * size)

    def _read_header(self) -> None:
        length = int.from_bytes(read_at(self._descriptor, 8, 0), "little")
        if not 2 <= length <= GREATEST_HEADER:
            raise ValueError("no safetensors header")
        text = read_at(self._descriptor, length, 8)
        header = json.loads(text)
        notes = json.loads(header.pop("__metadata__")["notes"])
        self.notes = _read_notes(notes)
        count = header.pop("keys")["shape"][0]
        header.pop("hashes")
        tensors = []
        for name, tensor in header.items():
            tensors.append((name, tensor["dtype"], tuple(tensor["shape"][1:])))
        self.layout = Layout(tuple(sorted(tensors)))

        # The header may be anybody's: nothing is allocated or read by its numbers before they are plausible.
        sides = [side for _, _, shape in self.layout.tensors for side in shape]
        if not header or not all(type(size) is int and size > 0 for size in (count, *sides)):
            raise ValueError("a shape is impossible")
        # Written anew from what was read, it must be the same: names, offsets and the notes' hash included.
        if text.rstrip() != encode_header(self.layout, count, notes)[8:].rstrip():
            raise ValueError("the header does not agree with itself")
        self._count = count
        self._begin = 8 + length
        self._offsets = {}
        start = self._begin + count * (KEY_BYTES + HASH_BYTES)
        for name, size in self.layout.sizes().items():
            self._offsets[name] = (start, size)
            start += count * size
        if os.fstat(self._descriptor).st_size != start:
            raise ValueError(f"{os.fstat(self._descriptor).st_size} bytes instead of {start}")


def _as_json(notes: Notes) -> dict[str, list[list[str]]]:
    """Key to [problem, action, kind] of each finding."""
    return {
        key: [[finding.problem, finding.action, finding.kind] for finding in findings]
        for key, findings in notes.items()
    }


def _read_notes(content: object) -> Notes:
    """Notes from JSON, which may hold anything although its hash is right.

    Raises:
        ValueError: They are no notes.
    """
    if not isinstance(content, dict):
        raise ValueError("the notes are no notes")
    notes: Notes = {}
    for key, findings in content.items():
        notes[key] = []
        # What is no list is no list of three strings either, and refused as one.
        for finding in findings if isinstance(findings, list) else [findings]:
            if not isinstance(finding, list) or [type(part) for part in finding] != [str] * 3:
                raise ValueError("the notes are no notes")
            problem, action, kind = finding
            if kind not in get_args(Kind):
                raise ValueError("a note is of an unknown kind")
            notes[key].append(Finding("", problem, action, kind))
    return notes
