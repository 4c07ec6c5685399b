"""The on-disk contract between precompute and training.

An example is records of its image variants and of its caption variants; equal captions share theirs. A record
is named after everything that shaped its contents (image bytes and crop, or text; the model that encoded it;
dtype; SCHEMA), so a changed ingredient means another record and a stale one is never read. Records lie in
packs, files that are written once.
"""

import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lora_utils import UserError
from lora_utils.data.findings import Finding, fixed
from lora_utils.precompute.packs import Layout, Notes, Pack, PackError, Row, new_row, write_pack
from lora_utils.system.files import set_aside, sweep
from lora_utils.system.portable import allow_many_open_files

LOGGER = logging.getLogger(__name__)
SCHEMA = 2
"""Raised when equal ingredients give other contents: all records are then made anew."""
PACK_NAME = re.compile(r"^(images|texts)-(\d{6,})-[0-9a-f]{8}\.safetensors$")
PACK_BYTES = 512 * 2**20
FEW_PACKS = 4  # of one layout, which are not worth joining
MANY_PACKS = 64  # written since the last joining, after which the next one comes
STALE_SECONDS = 3600.0
"""Unfinished files that are younger may be another run's, in a cache that several share."""
FLUSH_BYTES = 64 * 2**20
FLUSH_SHARE = 50  # time between two writes over the time of one


class CacheError(UserError):
    """A precomputed example is absent, damaged or not finite."""


def record_key(**ingredients: object) -> str:
    """Stable hash of everything that determines a record's contents: 32 hex digits."""
    text = json.dumps({"schema": SCHEMA, **ingredients}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """A folder of packs. What ``add`` is given is safe after ``commit``, or when enough has come together."""

    def __init__(self, folder: Path) -> None:
        """Open the packs without reading their records; a damaged one is set aside as ``.bad-…``."""
        self.folder = folder
        self.findings: list[Finding] = []
        self._packs: dict[int, Pack] = {}
        self._opened = 0
        # Pack number and row in one int: with 100,000 examples, a third of a tuple's memory.
        self._locations: dict[bytes, int] = {}
        self._pending: dict[tuple[str, Layout], dict[bytes, tuple[Row, Sequence[Finding]]]] = {}
        self._pending_bytes = 0
        self._last_flush = time.monotonic()
        self._flush_seconds = 0.0

        allow_many_open_files()  # every pack holds one, so that another run can join packs under a reader
        for path in self._pack_paths():
            self._open(path)
        self._joined = len(self._packs)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def read(self, key: str) -> dict[str, Tensor]:
        """One record, checked by hash and for NaN.

        Raises:
            CacheError: It is absent or damaged; then its pack is set aside, and the next precompute makes it
                anew.
        """
        name = bytes.fromhex(key)
        if name not in self._locations:
            raise CacheError(f"{self.folder} lacks record {key}; run the precompute stage")
        pack, row = self._locate(name)
        try:
            return pack.read(row)
        except (PackError, OSError) as error:
            pack.close()
            self._set_aside(pack.path)
            raise CacheError(
                f"{error}; run the same command again: it encodes what is damaged anew"
            ) from error

    def drop_damaged(self, keys: Iterable[str]) -> list[str]:
        """Forget those of these records whose hash does not fit, and return their keys: they are made
        anew.
        """
        damaged = []
        for key in keys:
            name = bytes.fromhex(key)
            if not _is_sound(*self._locate(name)):
                del self._locations[name]
                damaged.append(key)
        return damaged

    def record_bytes(self, keys: Iterable[str]) -> int:
        """Bytes that these records take on disk."""
        return sum(self._locate(bytes.fromhex(key))[0].layout.row_bytes for key in keys)

    def notes(self, key: str) -> Sequence[Finding]:
        """What was found wrong with its image or caption when a record was made; without the source."""
        name = bytes.fromhex(key)
        if name not in self._locations:
            return []
        pack, _ = self._locate(name)
        return pack.notes.get(key, [])

    def add(
        self, content: str, key: str, record: Mapping[str, Tensor], notes: Sequence[Finding] = ()
    ) -> None:
        """Keep one record, refusing NaN and infinity.

        Args:
            content: images or texts.
            key: From ``record_key``.
            record: moments (2C, h, w), time_ids (6,) and perhaps loss_mask (1, h, w); or prompt_embeds (L, D)
                and pooled_prompt_embeds (P,); fp32, fp16 or bf16, on the CPU.
            notes: What was found wrong with its image or caption. Examples share records, so without source.

        Raises:
            CacheError: A tensor holds NaN or infinity.
        """
        for name, tensor in record.items():
            if not torch.isfinite(tensor).all():
                raise CacheError(f"{name} not finite")
        row = new_row(bytes.fromhex(key), record)
        layout = Layout.of(record)
        self._pending.setdefault((content, layout), {})[row.key] = (row, notes)
        self._pending_bytes += layout.row_bytes

        # Writing takes a small share of the time, and a kill costs seconds of work.
        waited_seconds = time.monotonic() - self._last_flush
        is_time = waited_seconds > max(0.2, FLUSH_SHARE * self._flush_seconds)
        if self._pending_bytes > FLUSH_BYTES or is_time:
            self.commit()

    def commit(self) -> None:
        """Write what is pending."""
        started = time.monotonic()
        for (content, layout), rows in self._pending.items():
            notes = {key.hex(): list(findings) for key, (_, findings) in rows.items() if findings}
            self._write(content, layout, [row for row, _ in rows.values()], notes)
        self._pending = {}
        self._pending_bytes = 0
        if len(self._packs) - self._joined > MANY_PACKS:
            self.compact()
        self._last_flush = time.monotonic()
        self._flush_seconds = self._last_flush - started

    def compact(self) -> None:
        """Join small packs, so that a thousand examples are a handful of files; drop what was replaced.

        Nothing depends on it: where the disk is full or read-only, the packs stay as they are.
        """
        try:
            self._compact()
        except OSError as error:
            LOGGER.warning("the cache stays in many files: %s", error)

    def _compact(self) -> None:
        groups: dict[tuple[str, Layout], list[int]] = {}
        for number, pack in self._packs.items():
            # Half of a full one or more: joining would move many bytes to save one file.
            if len(pack) * pack.layout.row_bytes < PACK_BYTES // 2:
                content = pack.path.name.split("-")[0]
                groups.setdefault((content, pack.layout), []).append(number)
        for (content, layout), numbers in groups.items():
            if len(numbers) >= FEW_PACKS:
                self._join(content, layout, set(numbers))
        self._joined = len(self._packs)
        sweep(self.folder, STALE_SECONDS)

    def _join(self, content: str, layout: Layout, numbers: set[int]) -> None:
        """Copy the records of some packs into as few as possible; the packs go when the copies were read
        back.
        """
        live = [key for key, location in self._locations.items() if location >> 32 in numbers]
        damaged = set(self.drop_damaged(key.hex() for key in live))
        live = [key for key in live if key.hex() not in damaged]
        per_pack = max(1, PACK_BYTES // layout.row_bytes)
        for start in range(0, len(live), per_pack):
            rows = []
            notes = {}
            for key in live[start : start + per_pack]:
                pack, number = self._locate(key)
                rows.append(pack.row(number))
                if key.hex() in pack.notes:
                    notes[key.hex()] = pack.notes[key.hex()]
            joined = self._write(content, layout, rows, notes)
            for number in range(len(joined)):
                joined.read(number)  # only what was read back whole may replace its source
        for number in numbers:
            replaced = self._packs.pop(number)
            replaced.close()
            # On Windows another run may hold it: then it stays until that one has ended, and is joined again.
            with suppress(PermissionError):
                replaced.path.unlink(missing_ok=True)

    def _write(self, content: str, layout: Layout, rows: list[Row], notes: Notes) -> Pack:
        last = max((_pack_number(path) for path in self._pack_paths()), default=0)
        # The random part keeps two runs that share a cache from writing the same name.
        path = self.folder / f"{content}-{last + 1:06d}-{uuid.uuid4().hex[:8]}.safetensors"
        write_pack(path, layout, rows, notes)
        pack = Pack(path)
        self._keep(pack)
        return pack

    def _open(self, path: Path) -> None:
        try:
            self._keep(Pack(path))
        except FileNotFoundError:
            pass  # another run has joined it to others meanwhile; what is missed here is made anew
        except (PackError, OSError) as error:
            self._set_aside(path)
            self.findings.append(fixed(str(error), "set aside; its records are made anew").of(path.name))

    def _keep(self, pack: Pack) -> None:
        number = self._opened
        self._opened += 1
        self._packs[number] = pack
        # Later packs win: of two records of one key, the one that was made last counts.
        self._locations.update((key, number << 32 | row) for row, key in enumerate(pack.keys()))

    def _locate(self, key: bytes) -> tuple[Pack, int]:
        """The pack and the row of a record."""
        location = self._locations[key]
        return self._packs[location >> 32], location & 0xFFFFFFFF

    def _set_aside(self, path: Path) -> None:
        with suppress(OSError):  # gone meanwhile, or in a folder that is read-only
            set_aside(path)

    def _pack_paths(self) -> list[Path]:
        """All packs, in the order of their making."""
        if not self.folder.is_dir():
            return []
        packs = [path for path in self.folder.iterdir() if PACK_NAME.match(path.name)]
        return sorted(packs, key=lambda path: (_pack_number(path), path.name))


def _pack_number(path: Path) -> int:
    return int(path.name.split("-")[1])


def _is_sound(pack: Pack, row: int) -> bool:
    try:
        return pack.is_sound(row)
    except OSError:
        return False
