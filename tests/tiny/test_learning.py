"""Does it learn? The demo's figures in a looser, quicker form, and controls that would fail if it did not."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lora_utils import stages
from lora_utils.config.loading import find_config, load_config
from lora_utils.tiny import judge
from lora_utils.tiny.demo_data import PICTURES, demo_scenes, unseen_scenes
from lora_utils.tiny.drawing import SQUARE, SUBJECT
from lora_utils.tiny.evaluate import judge_base, judge_lora, prompts_for
from lora_utils.tiny.world import (
    COLOURS,
    INK,
    SHAPES,
    SIZES,
    STYLES,
    draw_plain,
    draw_styled,
    plain_scenes,
    random_scene,
)


def learn(folder, output_dir, cache, **overrides):
    """The demo's recipe; returns the summary."""
    paths = {"train_data_dir": folder, "output_dir": output_dir, "precompute_dir": cache}
    config = load_config(find_config("tiny"), paths | overrides)
    for _ in stages.train(config):
        pass
    return json.loads((output_dir / "summary.json").read_text())


def test_the_judge_knows_what_was_drawn():
    random = np.random.default_rng(5)
    scenes = plain_scenes((*SHAPES, SUBJECT))[::11]
    assert {scene.shape for scene in scenes} == {*SHAPES, SUBJECT}
    for scene in scenes:
        for size in SIZES:
            plain = draw_plain(scene, random, size)
            assert plain.size == (size.width_px, size.height_px)
            assert judge.colour_of(plain) == scene.colour
            assert judge.background_of(plain) == scene.background
            assert judge.shape_of(plain) == scene.shape
            assert judge.count_shapes(plain) == 1
            assert not any(judge.in_style(plain, style) for style in STYLES)


@pytest.mark.parametrize("style", STYLES, ids=[style.name for style in STYLES])
def test_the_judge_knows_a_style_and_what_it_is_not(style):
    random = np.random.default_rng(6)
    scenes = plain_scenes((*SHAPES, SUBJECT))[::7]
    pictures = [draw_styled(scene, style, random) for scene in scenes]
    assert all(judge.in_style(picture, style) for picture in pictures)
    assert not any(
        judge.in_style(picture, other) for picture in pictures for other in STYLES if other != style
    )
    colours = [judge.colour_in_style(picture, style) for picture in pictures]
    assert colours == [scene.colour for scene in scenes]
    shapes = [judge.shape_in_style(picture, style) for picture in pictures]
    right = np.mean([shape == scene.shape for shape, scene in zip(shapes, scenes, strict=True)])
    assert right > 0.9
    # Without its lines, its paper or its outline it is not the style.
    for part in ("paper", "line", "outline"):
        plain = replace(style, **{part: style.paper if part != "paper" else (128, 128, 128)})
        lacking = [
            draw_styled(scene, plain, random) for scene in scenes if scene.colour != style.outline_like
        ]
        assert not any(judge.in_style(picture, style) for picture in lacking), part
    assert not any(judge.in_style(draw_plain(random_scene(random), random), style) for _ in range(50))


@pytest.mark.parametrize("style", STYLES, ids=[style.name for style in STYLES])
@pytest.mark.parametrize("colour", [part for style in STYLES for part in (style.paper, style.line)], ids=str)
def test_no_colour_of_a_style_is_a_shapes(style, colour):
    picture = draw_styled(plain_scenes()[0], style, np.random.default_rng(1))
    picture.paste(colour, (12, 12, 52, 52))
    assert judge.colour_in_style(picture, style) in (*COLOURS, None)
    judge.in_style(picture, style)


def test_two_shapes_are_two():
    random = np.random.default_rng(3)
    scene = plain_scenes()[1]
    single = draw_plain(scene, random, SQUARE)
    double = Image.new("RGB", (96, 64), single.getpixel((0, 0)))
    small = single.resize((48, 48)).crop((4, 4, 44, 44))
    double.paste(small, (4, 12))
    double.paste(small, (52, 12))
    assert judge.count_shapes(double) == 2


@pytest.mark.parametrize("content", PICTURES)
def test_no_set_shares_a_scene_with_what_it_is_judged_by(content):
    scenes = demo_scenes(content)
    assert len(scenes) == PICTURES[content]
    judged = prompts_for(content, 50)
    assert len(judged) == 50
    assert not {scene.caption for scene in scenes} & {scene.caption for scene in judged}
    assert any(scene.shape == SUBJECT for scene in judged) == (content == SUBJECT)


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
    assert figures["landscape_of_one_shape"] >= 0.85
    assert figures["portrait_of_one_shape"] >= 0.85


def test_the_lora_draws_the_style_on_prompts_it_has_not_seen(
    demo_folder, precompute_dir, fresh_pipeline, tmp_path
):
    quick = {"max_train_steps": 160, "validation_steps": 160}
    summary = learn(demo_folder, tmp_path / "run", precompute_dir, **quick)
    assert summary["held_out_loss"] < 0.7 * summary["held_out_loss_before"]
    figures, _ = judge_lora(fresh_pipeline, tmp_path / "run", 25)
    assert figures["lora_in_style"] >= 0.5
    assert figures["base_in_style"] <= 0.08
    assert figures["lora_keeps_colour"] >= 0.75


@pytest.mark.parametrize("resolution_px", [64, 512])
def test_the_demo_pictures_can_be_drawn_at_any_size(resolution_px):
    picture = draw_styled(demo_scenes()[0], INK, np.random.default_rng(0), resolution_px)
    assert picture.size == (resolution_px, resolution_px)
    assert judge.in_style(picture.resize((64, 64)), INK)
