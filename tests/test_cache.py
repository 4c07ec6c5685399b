"""Packs and the cache: what is written is read back or refused, at any moment of a kill."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_utils.cache import FEW_PACKS, Cache, CacheError, record_key


def image_record(seed=0, side=4):
    generator = torch.Generator().manual_seed(seed)
    return {"moments": torch.randn(8, side, side, generator=generator), "time_ids": torch.arange(6.0)}


def text_record(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(77, 4, generator=generator).to(dtype)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[0]}


def key(number):
    return record_key(number=number)


def filled(folder, count=6):
    cache = Cache(folder)
    for number in range(count):
        cache.add("images", key(number), image_record(number), [["turned", "as EXIF says", "fixed"]] if number else [])
    cache.commit()
    return cache


def assert_holds(cache, numbers):
    for number in numbers:
        for name, tensor in cache.read(key(number)).items():
            assert torch.equal(tensor, image_record(number)[name])


def packs(folder):
    return sorted(folder.glob("[!.]*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_record_reads_back_as_it_was_written(tmp_path, dtype):
    cache = Cache(tmp_path)
    cache.add("texts", key(1), text_record(1, dtype), [])
    cache.commit()
    for reader in (cache, Cache(tmp_path)):
        for name, tensor in reader.read(key(1)).items():
            assert torch.equal(tensor, text_record(1, dtype)[name])


def test_a_pack_is_a_safetensors_file_that_others_read(tmp_path):
    filled(tmp_path)
    [path] = packs(tmp_path)
    tensors = load_file(path)
    assert tensors["moments"].shape == (6, 8, 4, 4)
    assert torch.equal(tensors["moments"][3], image_record(3)["moments"])
    assert tensors["keys"][2].numpy().tobytes().hex() == key(2)


def test_notes_stay_with_their_record(tmp_path):
    filled(tmp_path)
    assert Cache(tmp_path).notes(key(1)) == [["turned", "as EXIF says", "fixed"]]
    assert Cache(tmp_path).notes(key(0)) == []
    assert Cache(tmp_path).notes(key(99)) == []


def test_records_of_different_shapes_lie_in_different_packs(tmp_path):
    cache = Cache(tmp_path)
    cache.add("images", key(1), image_record(1, 4), [])
    cache.add("images", key(2), image_record(2, 6), [])
    cache.commit()
    assert len(packs(tmp_path)) == 2
    assert Cache(tmp_path).read(key(2))["moments"].shape == (8, 6, 6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(tmp_path, bad):
    record = image_record()
    record["moments"][0, 0, 0] = bad
    cache = Cache(tmp_path)
    with pytest.raises(CacheError, match="moments not finite"):
        cache.add("images", key(1), record, [])
    cache.commit()
    assert key(1) not in cache
    assert packs(tmp_path) == []


def test_a_thousand_records_in_many_commits_become_a_handful_of_files(tmp_path):
    cache = Cache(tmp_path)
    for number in range(1000):
        cache.add("images", key(number), image_record(number), [])
        if number % 10 == 0:
            cache.commit()
    cache.commit()
    cache.compact()
    assert len(packs(tmp_path)) < FEW_PACKS
    assert len(Cache(tmp_path)) == 1000
    assert_holds(cache, range(1000))
    assert_holds(Cache(tmp_path), range(1000))


def test_of_two_records_of_one_key_the_later_counts_also_after_joining(tmp_path):
    for number in range(FEW_PACKS):
        cache = Cache(tmp_path)
        cache.add("images", key(0), image_record(number), [])
        cache.commit()
    cache = Cache(tmp_path)
    cache.compact()
    assert len(packs(tmp_path)) == 1
    for reader in (cache, Cache(tmp_path)):
        assert torch.equal(reader.read(key(0))["moments"], image_record(FEW_PACKS - 1)["moments"])


def overwrite(path: Path, offset: int, content: bytes):
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(content)


def swap_rows(path):
    content = bytearray(path.read_bytes())
    size = 8 * 4 * 4 * 4
    start = content.index(image_record(0)["moments"].numpy().tobytes())
    content[start : start + 2 * size] = content[start + size : start + 2 * size] + content[start : start + size]
    path.write_bytes(content)


CORRUPTIONS = {
    "one flipped bit of the data": lambda path: overwrite(path, -700, b"\xff"),
    "zeros at the end": lambda path: overwrite(path, -1200, bytes(1200)),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "not a pack": lambda path: path.write_bytes(b"<html>" * 900),
    "a flipped bit of the header": lambda path: overwrite(path, 20, b"\x00"),
    "another shape in the header": lambda path: path.write_bytes(path.read_bytes().replace(b"8, 4, 4]", b"4, 8, 4]")),
    "another dtype in the header": lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"')),
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


def test_damage_found_while_reading_names_the_cure_and_sets_the_pack_aside(tmp_path):
    filled(tmp_path)
    [path] = packs(tmp_path)
    overwrite(path, -700, b"\xff" * 600)
    cache = Cache(tmp_path)
    with pytest.raises(CacheError, match="run the same command again"):
        cache.read(key(5))
    assert key(0) not in Cache(tmp_path)
    assert [bad.name for bad in tmp_path.iterdir()] == [f".bad-{path.name}"]


def test_a_pack_that_cannot_be_opened_is_told(tmp_path):
    filled(tmp_path)
    [path] = packs(tmp_path)
    path.write_bytes(b"junk")
    [finding] = Cache(tmp_path).findings
    assert finding.source == path.name
    assert "set aside" in finding.action


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_an_error_at_any_file_operation_loses_nothing_that_was_committed(tmp_path, monkeypatch, function):
    """Every call of an operation in turn fails, as on a full disk; the next run finds what was safe and goes on."""
    failures = 0
    for failing in range(1000):
        folder = tmp_path / str(failing)
        cache = filled(folder, 2)
        calls, genuine = [], getattr(os, function)

        def fail_once(*arguments, **options):
            calls.append(arguments)  # noqa: B023
            if len(calls) == failing + 1:  # noqa: B023
                raise OSError(28, "No space left on device")
            return genuine(*arguments, **options)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail_once)
            try:
                for number in range(2, 2 + FEW_PACKS):
                    cache.add("images", key(number), image_record(number), [])
                    cache.commit()
                cache.compact()
            except OSError:
                failures += 1
        again = Cache(folder)
        assert_holds(again, [0, 1])
        for number in range(2, 2 + FEW_PACKS):
            if key(number) not in again:
                again.add("images", key(number), image_record(number), [])
        again.commit()
        again.compact()
        assert_holds(Cache(folder), range(2 + FEW_PACKS))
        if len(calls) <= failing:
            break
    assert failures > 3


def test_every_ingredient_changes_the_name_of_a_record():
    ingredients = {"image": "h", "crop": 64, "vae": "v"}
    keys = {record_key(**ingredients)} | {record_key(**ingredients | {name: "x"}) for name in ingredients}
    assert len(keys) == 4
