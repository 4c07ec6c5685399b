"""Damaged packs: whatever is wrong with a file, no damaged record is ever returned."""

import os
from pathlib import Path

import pytest

from lora_utils.precompute.cache import Cache, CacheError
from tests.precompute.test_cache import assert_holds, filled, image_record, key, packs


def overwrite(path: Path, offset: int, content: bytes):
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(content)


def swap_rows(path):
    content = bytearray(path.read_bytes())
    size = 8 * 4 * 4 * 4
    start = content.index(image_record(0)["moments"].numpy().tobytes())
    content[start : start + 2 * size] = (
        content[start + size : start + 2 * size] + content[start : start + size]
    )
    path.write_bytes(content)


CORRUPTIONS = {
    "one flipped bit of the data": lambda path: overwrite(path, -700, b"\xff"),
    "zeros at the end": lambda path: overwrite(path, -1200, bytes(1200)),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "not a pack": lambda path: path.write_bytes(b"<html>" * 900),
    "a flipped bit of the header": lambda path: overwrite(path, 20, b"\x00"),
    "another shape in the header": lambda path: path.write_bytes(
        path.read_bytes().replace(b"8, 4, 4]", b"4, 8, 4]")
    ),
    "another dtype in the header": lambda path: path.write_bytes(
        path.read_bytes().replace(b'"F32"', b'"I32"')
    ),
    "two rows changed places": swap_rows,
    "NaN in the data": lambda path: overwrite(path, -900, b"\x00\x00\xc0\x7f" * 8),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_no_damaged_record_is_ever_returned(tmp_path, corrupt):
    filled(tmp_path)
    [path] = packs(tmp_path)
    before = path.read_bytes()
    corrupt(path)
    assert path.read_bytes() != before
    cache = Cache(tmp_path)
    kept = [number for number in range(6) if key(number) in cache]
    damaged = cache.drop_damaged(key(number) for number in kept)
    assert len(damaged) + 6 - len(kept) > 0
    assert_holds(cache, [number for number in kept if key(number) not in damaged])
    for number in range(6):
        if key(number) not in cache:
            cache.add("images", key(number), image_record(number), [])
    cache.commit()
    cache.compact()
    assert_holds(Cache(tmp_path), range(6))


def test_a_flipped_bit_in_the_notes_is_damage(tmp_path):
    filled(tmp_path)
    [path] = packs(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"fixed", b"fihed", 1))
    assert len(Cache(tmp_path)) == 0


def test_a_record_is_checked_every_time_it_is_read(tmp_path):
    cache = filled(tmp_path)
    cache.read(key(5))
    [path] = packs(tmp_path)
    overwrite(path, -700, bytes(600))
    with pytest.raises(CacheError, match=r"record [0-9a-f]+ is damaged"):
        cache.read(key(5))


def test_damage_found_while_reading_names_the_cure_and_sets_the_pack_aside(tmp_path):
    filled(tmp_path)
    [path] = packs(tmp_path)
    overwrite(path, -700, b"\xff" * 600)
    cache = Cache(tmp_path)
    with pytest.raises(CacheError, match="run the same command again"):
        cache.read(key(5))
    assert key(0) not in Cache(tmp_path)
    [bad] = tmp_path.iterdir()
    assert bad.name.startswith(f".bad-{path.name}-")


def test_a_pack_that_cannot_be_opened_is_told(tmp_path):
    filled(tmp_path)
    [path] = packs(tmp_path)
    path.write_bytes(b"junk")
    [finding] = Cache(tmp_path).findings
    assert finding.source == path.name
    assert "set aside" in finding.action
