"""Does it learn? The demo's figures in a looser, quicker form, and controls that would fail if it did not."""

import json

import numpy as np
import pytest

from lora_utils import stages
from lora_utils.config.loading import find_config, load_config
from lora_utils.tiny import judge
from lora_utils.tiny.demo_data import demo_scenes, unseen_scenes
from lora_utils.tiny.evaluate import judge_base, judge_lora
from lora_utils.tiny.world import INK, STYLES, draw_plain, draw_styled, plain_scenes, random_scene


def learn(folder, output_dir, cache, **overrides):
    """The demo's recipe; returns the summary."""
    paths = {"train_data_dir": folder, "output_dir": output_dir, "precompute_dir": cache}
    config = load_config(find_config("tiny"), paths | overrides)
    for _ in stages.train(config):
        pass
    return json.loads((output_dir / "summary.json").read_text())


def test_the_judge_knows_what_was_drawn():
    random = np.random.default_rng(5)
    for scene in plain_scenes()[::7]:
        plain = draw_plain(scene, random)
        ink = draw_ink(scene, random)
        assert judge.colour_of(plain) == scene.colour
        assert judge.background_of(plain) == scene.background
        assert judge.shape_of(plain) == scene.shape
        assert judge.colour_of_ink(ink) == scene.colour
        assert judge.is_ink(ink)
        assert not judge.is_ink(plain)
    assert not any(judge.is_ink(draw_plain(random_scene(random), random)) for _ in range(50))


def test_the_demo_set_is_enough_and_leaves_prompts_unseen(demo_folder):
    images = [path for path in demo_folder.iterdir() if path.suffix != ".txt"]
    assert len(images) >= 60
    assert {path.suffix for path in images} == {".jpg", ".png"}
    assert all(path.with_suffix(".txt").read_text().strip() for path in images)
    unseen = unseen_scenes(50)
    assert len(unseen) == 50
    assert not set(unseen) & set(demo_scenes())

    # Nor does the demo show its comparison with captions that were learned by heart.
    shown = load_config(find_config("tiny")).compare.prompt
    assert len(shown) == 8
    assert not set(shown) & {scene.caption for scene in demo_scenes()}


def test_the_base_model_draws_what_it_is_told(tiny_pipeline):
    figures, _ = judge_base(tiny_pipeline, 50)
    assert figures["colour"] >= 0.9
    assert figures["background"] >= 0.9
    assert figures["shape"] >= 0.85


def test_the_lora_draws_the_style_on_prompts_it_has_not_seen(
    demo_folder, precompute_dir, fresh_pipeline, tmp_path
):
    quick = {"max_train_steps": 400, "validation_steps": 400}
    summary = learn(demo_folder, tmp_path / "run", precompute_dir, **quick)
    assert summary["held_out_loss"] < 0.7 * summary["held_out_loss_before"]
    figures, _ = judge_lora(fresh_pipeline, tmp_path / "run", 25)
    assert figures["lora_in_ink_style"] >= 0.5
    assert figures["base_in_ink_style"] <= 0.08
    assert figures["lora_keeps_colour"] >= 0.75


@pytest.mark.parametrize("resolution_px", [64, 512])
def test_the_demo_pictures_can_be_drawn_at_any_size(resolution_px):
    picture = draw_ink(demo_scenes()[0], np.random.default_rng(0), resolution_px)
    assert picture.size == (resolution_px, resolution_px)
    assert judge.is_ink(picture.resize((64, 64)))
