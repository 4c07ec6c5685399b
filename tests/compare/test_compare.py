"""Base against LoRA: equal seeds, exact scale 0, reproducible by anyone's pipeline."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils import stages
from lora_utils.compare.sampling import Shot
from lora_utils.compare.sheet import GAP_PX, TILE_PX, contact_sheet
from lora_utils.config.loading import load_config
from lora_utils.model import lora


@pytest.fixture
def trained(make_config):
    """A config whose run folder holds an adapter that changes pictures."""

    def make(**overrides):
        config = make_config(max_train_steps=4, learning_rate=1e-2, **overrides)
        list(stages.train(config))
        return config

    return make


def same(left, right):
    return np.array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["attn"]},
        {"target_modules": ["full"], "conv_rank": 2, "lora_alpha": 9},
        {"target_modules": ["full"], "conv_rank": 32, "lora_alpha": 9, "use_rslora": True},
    ],
    ids=str,
)
def test_a_fresh_pipeline_reproduces_both_pictures_exactly(trained, fresh_pipeline, settings):
    config = trained(seeds=[3, 4], negative_prompt="green", **settings)
    result = stages.compare(config)

    def draw(seed):
        return fresh_pipeline(
            config.compare.prompt[0],
            negative_prompt="green",
            num_inference_steps=3,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]

    assert all(
        same(draw(shot.seed), image) for shot, image in zip(result.shots, result.baseline, strict=True)
    )
    fresh_pipeline.load_lora_weights(config.paths.output_dir, weight_name=lora.WEIGHTS_NAME)
    assert all(
        same(draw(shot.seed), image) for shot, image in zip(result.shots, result.finetuned, strict=True)
    )
    assert not same(result.baseline[0], result.finetuned[0])
    assert not same(result.baseline[0], result.baseline[1])


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"target_modules": ["full"]}, {"use_rslora": True, "lora_alpha": 9}],
    ids=str,
)
def test_between_pictures_with_the_lora_the_base_stays_the_base(trained, fresh_pipeline, settings):
    result = stages.compare(trained(prompt=["a", "b"], **settings))
    for prompt, image, changed in zip("ab", result.baseline, result.finetuned, strict=True):
        drawn = fresh_pipeline(
            prompt, num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(0)
        )
        assert same(drawn.images[0], image)
        assert not same(image, changed)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_scale_zero_is_the_base_model_bit_for_bit(trained, settings):
    result = stages.compare(trained(adapter_scale=0, **settings))
    assert same(result.baseline[0], result.finetuned[0])


def test_the_scale_matters(trained):
    config = trained()
    half = stages.compare(load_config(None, flat(config) | {"adapter_scale": 0.5}))
    full = stages.compare(config)
    assert not same(half.finetuned[0], full.finetuned[0])


def test_files_are_named_and_carry_their_settings(trained):
    config = trained(prompt=["a red star", "ein grüner Ring, 4k"], seeds=[1, 2])
    result = stages.compare(config)
    names = {path.name for path in result.folder.glob("*.png")}
    assert len([name for name in names if name.startswith("baseline_")]) == 4
    assert len([name for name in names if name.startswith("finetuned_")]) == 4
    assert "sheet.png" in names
    with Image.open(result.folder / "finetuned_002_seed1.png") as image:
        facts = json.loads(image.text["lora_utils"])
        assert (facts["prompt"], facts["seed"], facts["adapter_scale"]) == ("ein grüner Ring, 4k", 1, 1.0)
        assert "Steps: 3, CFG scale: 4.0, Seed: 1" in image.text["parameters"]


def test_the_sheet_has_room_for_every_pair():
    shots = [Shot(f"prompt {number}", 0) for number in range(10)]
    tiles = [Image.new("RGB", (64, 64), "red")] * 10
    sheet = contact_sheet(shots, {"base": tiles, "LoRA": tiles})
    red = (np.asarray(sheet) == (255, 0, 0)).all(axis=-1).sum()
    assert red == 20 * (TILE_PX - GAP_PX) ** 2


def test_without_a_lora_nothing_is_written(make_config):
    config = make_config()
    with pytest.raises(lora.LoraError, match="train first"):
        stages.compare(config)
    assert not config.paths.output_dir.exists()


def test_a_lora_for_another_base_stops_before_anything_is_written(trained):
    config = trained()
    file = config.paths.output_dir / lora.WEIGHTS_NAME
    from safetensors.torch import load_file, save_file

    save_file({name: torch.zeros(4, 640) for name in load_file(file)}, file)
    with pytest.raises(lora.LoraError, match="another base"):
        stages.compare(config)
    assert not (config.paths.output_dir / "compare").exists()


def flat(config):
    return {leaf: value for section in config.model_dump().values() for leaf, value in section.items()}
