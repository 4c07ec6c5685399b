"""The recipe of the tiny model: a run that was cut off ends as one that was not."""

import numpy as np
import pytest
import torch
from torch import nn

from lora_utils.tiny import architecture, judge, recipe
from lora_utils.tiny.drawing import SUBJECT
from lora_utils.tiny.lessons import made_up_word, random_lesson
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


@pytest.mark.parametrize(("steps", "rate", "said"), [(9, 1e-2, "9 steps"), (8, 2e-2, "learning rate 0.02")])
def test_the_state_of_another_plan_is_refused(tmp_path, steps, rate, said):
    model, loss_at = model_and_loss()
    recipe.fit("m", model, loss_at, 8, 1e-2, tmp_path)
    with pytest.raises(
        recipe.StateError, match=f"of 8 steps, learning rate 0.01, not of .*{said}.*state_dir"
    ):
        recipe.fit("m", model, loss_at, steps, rate, tmp_path)


@pytest.mark.parametrize("change", [{"used": nn.Linear(4, 5)}, {"more": nn.Linear(4, 4)}], ids=str)
def test_the_state_of_another_model_is_refused(tmp_path, change):
    model, loss_at = model_and_loss()
    recipe.fit("m", model, loss_at, 8, 1e-2, tmp_path)
    model.update(change)
    with pytest.raises(recipe.StateError, match="another model"):
        recipe.fit("m", model, loss_at, 8, 1e-2, tmp_path)


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


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_shape_stands_further_left_the_more_was_cut_off_there(size):
    random = np.random.default_rng(3)
    lessons = [random_lesson(random, size) for _ in range(1500)]
    cut = [lesson for lesson in lessons if lesson.time_ids[3] and lesson.time_ids[0] > size.height_px]
    assert len(cut) > 50

    def middle_px(picture):
        pixels = np.asarray(picture, float)
        columns = np.abs(pixels - np.median(pixels[0], axis=0)).sum(axis=(0, 2))
        return (columns * np.arange(len(columns))).sum() / columns.sum()

    cut_px = [lesson.time_ids[3] for lesson in cut]
    assert np.corrcoef(cut_px, [middle_px(lesson.picture) for lesson in cut])[0, 1] < -0.5


def test_no_lesson_names_or_shows_the_subject():
    random = np.random.default_rng(4)
    lessons = [random_lesson(random, SIZES[0]) for _ in range(400)]
    words = {lesson.caption.split()[2] for lesson in lessons}
    assert words > {*SHAPES, "shape"}
    assert len(words - {*SHAPES, "shape"}) > 10
    whole = [lesson.picture for lesson in lessons if lesson.time_ids[:4] == (*SIZES[0], 0, 0)]
    assert len(whole) > 50
    assert SUBJECT not in map(judge.shape_of, whole)


def test_a_made_up_word_is_never_the_subjects_own():
    syllables = iter([*SUBJECT, *"bara"])

    class Throws:
        def integers(self, *_):
            return 2

        def choice(self, _):
            return next(syllables)

    assert made_up_word(Throws()) == "bara"
