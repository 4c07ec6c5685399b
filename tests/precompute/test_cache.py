"""Packs and the cache: what is written is read back or refused, at any moment of a kill."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_utils.data.findings import fixed
from lora_utils.precompute.cache import FEW_PACKS, Cache, CacheError, record_key

TURNED = fixed("turned", "as EXIF says")


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
        cache.add("images", key(number), image_record(number), [TURNED] if number else [])
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
    with safe_open(path, framework="pt") as file:
        notes = json.loads(file.metadata()["notes"])
    assert notes[key(2)] == [["turned", "as EXIF says", "fixed"]]


def test_notes_stay_with_their_record(tmp_path):
    filled(tmp_path)
    assert Cache(tmp_path).notes(key(1)) == [TURNED]
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


def test_where_joining_fails_the_packs_stay_as_they_are(tmp_path, monkeypatch):
    cache = filled(tmp_path, 2)
    for number in range(2, 6):
        cache.add("images", key(number), image_record(number), [])
        cache.commit()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        cache.compact()
    assert_holds(cache, range(6))
    assert_holds(Cache(tmp_path), range(6))


def test_numbers_of_packs_may_grow_beyond_six_digits(tmp_path):
    filled(tmp_path)
    [path] = packs(tmp_path)
    path.rename(path.with_name(path.name.replace("000001", "999999")))
    cache = Cache(tmp_path)
    cache.add("images", key(0), image_record(9), [])
    cache.commit()
    assert torch.equal(Cache(tmp_path).read(key(0))["moments"], image_record(9)["moments"])


def test_a_folder_named_like_a_pack_is_set_aside(tmp_path):
    (tmp_path / "images-000001-00000000.safetensors").mkdir()
    assert len(Cache(tmp_path).findings) == 1


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_an_error_at_any_file_operation_loses_nothing_that_was_committed(tmp_path, monkeypatch, function):
    """Every call of an operation in turn fails, as on a full disk; the next run finds what was safe and goes
    on.
    """
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
