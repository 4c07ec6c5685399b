"""Which examples a run visits: each as often as it should, never two shapes in a batch, in one order."""

from collections import Counter
from itertools import islice

import pytest
import torch

from lora_utils.precompute.cache import Cache, record_key
from lora_utils.precompute.examples import CachedExamples, Entry
from lora_utils.training.batches import micro_batches
from lora_utils.training.seeds import data_order, visit_generator


def entry(number, size=(64, 64), repeats=1, images=1, texts=1):
    image_keys = tuple(record_key(image=number, crop=crop) for crop in range(images))
    text_keys = tuple(record_key(text=number, variant=variant) for variant in range(texts))
    captions = tuple(f"{number} {variant}" for variant in range(texts))
    return Entry(f"{number}.png", captions, image_keys, text_keys, size, repeats, False)


MIXED = [entry(n, [(64, 64), (96, 48), (48, 96)][n % 3 if n < 12 else 0], 1 + n % 2) for n in range(17)]


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_a_batch_never_mixes_shapes_and_is_always_full(size):
    for batch in islice(micro_batches(MIXED, size, 0), 200):
        assert len(batch) == size
        assert len({MIXED[number].size for number in batch}) == 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_example_is_shown_as_often_as_its_repeats_say(size):
    epoch = sum(one.repeats for one in MIXED)
    batches = islice(micro_batches(MIXED, size, 0), 60 * epoch // size)
    counts = Counter(number for batch in batches for number in batch)
    for number, one in enumerate(MIXED):
        assert counts[number] == pytest.approx(
            60 * one.repeats, abs=size * 3
        )  # a batch of its shape may be waiting


def test_one_shape_is_the_shuffled_order_cut_into_batches():
    entries = [entry(number) for number in range(10)]
    visits = [number for batch in islice(micro_batches(entries, 4, 3), 5) for number in batch]
    assert visits == [*data_order(3, 0, 10), *data_order(3, 1, 10)]


def test_the_seed_decides_the_order():
    first = list(islice(micro_batches(MIXED, 3, 5), 50))
    assert list(islice(micro_batches(MIXED, 3, 5), 50)) == first
    assert list(islice(micro_batches(MIXED, 3, 6), 50)) != first


def test_every_variant_comes_with_equal_chance_and_with_its_own_example(tmp_path):
    """By construction: a record's content is its example's number and its variant's."""
    entries = [entry(number, images=3, texts=2) for number in range(4)]
    cache = Cache(tmp_path)
    for number, one in enumerate(entries):
        for crop, key in enumerate(one.image_keys):
            moments = torch.full((8, 2, 2), 10.0 * number + crop)
            cache.add("images", key, {"moments": moments, "time_ids": torch.zeros(6)}, [])
        for variant, key in enumerate(one.text_keys):
            embeds = torch.full((77, 4), 10.0 * number + variant)
            cache.add("texts", key, {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[0]}, [])
    cache.commit()
    examples, seen = CachedExamples(Cache(tmp_path), entries), Counter()
    numbers = [number for batch in islice(micro_batches(entries, 3, 0), 800) for number in batch]
    for visit, number in enumerate(numbers):
        example = examples.draw(number, visit_generator(0, visit))
        image, text = int(example["moments"][0, 0, 0]), int(example["prompt_embeds"][0, 0])
        assert image // 10 == text // 10 == number
        assert torch.equal(example["pooled_prompt_embeds"], example["prompt_embeds"][0])
        seen[number, image % 10, text % 10] += 1
    assert len(seen) == 4 * 3 * 2
    assert all(60 < count < 145 for count in seen.values())  # 100 expected
