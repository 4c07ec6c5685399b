"""The recipe of the tiny model: a run that was cut off ends as one that was not."""

import numpy as np
import pytest
import torch
from torch import nn

from lora_utils.tiny import architecture, recipe
from lora_utils.tiny.drawing import SUBJECT
from lora_utils.tiny.lessons import random_lesson
from lora_utils.tiny.world import SHAPES, SIZES


def model_and_loss(interrupt_at=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({"used": nn.Linear(4, 4), "never_read": nn.Linear(4, 4)})

    def loss_at(step):
        if step == interrupt_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        return model["used"](torch.randn(8, 4, generator=generator)).square().mean()

    return model, loss_at


def test_a_recipe_that_was_cut_off_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SAVE_EVERY_STEPS", 2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, loss_at = model_and_loss()
    recipe.fit("m", whole, loss_at, 8, 1e-2, tmp_path / "whole")
    first, loss_at = model_and_loss(interrupt_at=5)
    with pytest.raises(KeyboardInterrupt):
        recipe.fit("m", first, loss_at, 8, 1e-2, tmp_path / "cut")
    second, loss_at = model_and_loss()
    recipe.fit("m", second, loss_at, 8, 1e-2, tmp_path / "cut")
    for left, right in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_any_text_can_be_encoded(tmp_path):
    first, second = architecture.build_tokenizers(["a red star", "a blue ring"], tmp_path)
    for text in ("", "a red star", "Ünïcode 🦊!", "日本語 " * 200):
        ids = first(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == 77
        assert max(ids) == len(first) - 1 == first.eos_token_id
        assert second(text, padding="max_length", truncation=True).input_ids[0] == second.bos_token_id
    assert first.pad_token_id == first.eos_token_id
    assert second.pad_token == "!"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_time_ids_say_what_became_of_a_picture(size):
    random = np.random.default_rng(2)
    lessons = [random_lesson(random, size) for _ in range(300)]
    assert all(lesson.picture.size == (size.width_px, size.height_px) for lesson in lessons)
    assert all(lesson.time_ids[4:] == size for lesson in lessons)
    cropped = [lesson for lesson in lessons if any(lesson.time_ids[2:4])]
    smaller = [lesson for lesson in lessons if lesson.time_ids[0] < 0.6 * size.height_px]
    own = [lesson for lesson in lessons if lesson.time_ids[:4] == (*size, 0, 0)]
    assert min(len(cropped), len(smaller), len(own)) > 20

    def sharpness(chosen):
        steps = [np.abs(np.diff(np.asarray(lesson.picture, float), axis=1)).max() for lesson in chosen]
        return np.median(steps)

    assert sharpness(smaller) < 0.8 * sharpness(own)


def test_no_lesson_names_or_shows_the_subject():
    random = np.random.default_rng(4)
    words = {lesson.caption.split()[2] for lesson in (random_lesson(random, SIZES[0]) for _ in range(400))}
    assert words > {*SHAPES, "shape"}
    assert len(words - {*SHAPES, "shape"}) > 10
    assert SUBJECT not in words
