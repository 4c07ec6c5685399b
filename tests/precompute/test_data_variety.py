"""Mixed shapes, crops, masks, many captions: from the folder through the cache into training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils import stages
from lora_utils.model.base import PretrainedSdxl
from lora_utils.precompute.examples import CachedExamples
from lora_utils.training import diffusion, objective, seeds
from lora_utils.training.batches import micro_batches

BUCKETS = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}


def draw(folder, name, size, caption, mode="RGB"):
    folder.mkdir(exist_ok=True)
    channels = len(mode)
    pixels = np.random.default_rng(len(name) + size[0]).integers(
        0, 256, (size[1], size[0], channels), dtype=np.uint8
    )
    Image.fromarray(pixels, mode).save(folder / name)
    (folder / name).with_suffix(".txt").write_text(caption)


def finite(reports):
    return all(np.isfinite(report.loss) for report in reports)


def test_a_folder_of_mixed_shapes_trains_through_buckets(make_config, tmp_path):
    sizes = [(64, 64), (128, 64), (64, 128), (200, 100), (90, 120), (150, 60), (64, 66), (300, 301)]
    for number, size in enumerate(sizes * 2):
        draw(tmp_path / "mixed", f"{number:02d}.png", size, f"a picture of {size}")
    config = make_config(train_data_dir=tmp_path / "mixed", max_train_steps=8, **BUCKETS)
    found = stages.precompute(config)
    # width and height of the image -> of its bucket; then original height, width, top, left, target height,
    # width
    expected = {
        (64, 64): ((64, 64), [64, 64, 0, 0, 64, 64]),
        (128, 64): ((80, 48), [64, 128, 0, 8, 48, 80]),
        (64, 128): ((48, 80), [128, 64, 8, 0, 80, 48]),
        (200, 100): ((80, 48), [100, 200, 0, 8, 48, 80]),
        (90, 120): ((48, 80), [120, 90, 0, 6, 80, 48]),
        (150, 60): ((96, 32), [60, 150, 3, 0, 32, 96]),
        (64, 66): ((64, 64), [66, 64, 1, 0, 64, 64]),
        (300, 301): ((64, 64), [301, 300, 0, 0, 64, 64]),
    }
    examples = CachedExamples(found.cache, found.entries)
    for number, entry in enumerate(found.entries):
        size, time_ids = expected[sizes[number % len(sizes)]]
        example = examples.read(number)
        assert entry.size == size
        assert example["time_ids"].tolist() == time_ids
        assert example["moments"].shape == (8, size[1] // 4, size[0] // 4)
    reports = list(stages.train(config))
    assert len(reports) == 8
    assert finite(reports)


def test_wide_pictures_with_odd_latents_train_and_compare(make_config, tmp_path):
    """As 1280x720 is in SDXL, 128x72 is in the tiny model: its latents cannot be halved twice evenly."""
    for number in range(4):
        draw(tmp_path / "wide", f"{number}.jpg", (192, 108), "a wide picture")
    config = make_config(train_data_dir=tmp_path / "wide", resolution="128x72", max_train_steps=2)
    found = stages.precompute(config)
    example = CachedExamples(found.cache, found.entries).read(0)
    assert example["moments"].shape == (8, 18, 32)
    assert example["time_ids"].tolist() == [108, 192, 0, 0, 72, 128]
    assert finite(list(stages.train(config)))
    result = stages.compare(config)
    assert result.finetuned[0].size == (128, 72)
    assert Image.open(result.folder / "sheet.png").width > 0


def test_a_shuffled_run_pairs_every_latent_with_its_own_caption(make_config, tmp_path):
    """By construction: each picture is one grey, its caption names it, and both are recomputed for every
    visit.
    """
    for number in range(8):
        folder = tmp_path / "grey"
        draw(folder, f"{number}.png", (64, 64), f"a square of grey {number * 30}")
        Image.new("RGB", (64, 64), (number * 30,) * 3).save(folder / f"{number}.png")
    config = make_config(train_data_dir=tmp_path / "grey", random_flip=True, trigger_word="plain")
    found = stages.precompute(config)
    base = PretrainedSdxl(config.model)
    vae, texts = base.load_vae(), base.load_text_pipeline(torch.float32)
    means, embeds = [], []
    for number in range(8):
        pixels = torch.full((8, 3, 64, 64), number * 30 / 127.5 - 1)
        with torch.no_grad():
            means.append(vae.encode(pixels).latent_dist.parameters[0])
        embeds.append(
            texts.encode_prompt(f"plain, a square of grey {number * 30}", do_classifier_free_guidance=False)[
                0
            ]
        )
    examples, visited = CachedExamples(found.cache, found.entries), set()
    order = micro_batches(found.entries, 3, seed=7)
    for visit in range(40):
        for number in next(order):
            example = examples.draw(number, seeds.visit_generator(7, visit))
            nearest = min(range(8), key=lambda one: float((example["moments"] - means[one]).abs().mean()))
            torch.testing.assert_close(example["prompt_embeds"], embeds[nearest][0], rtol=1e-4, atol=1e-4)
            assert found.entries[number].source == f"{nearest}.png"
            visited.add(nearest)
    assert visited == set(range(8))


def test_masked_parts_do_not_count(make_config, tmp_path):
    folder, masks = tmp_path / "pictures", tmp_path / "masks"
    masks.mkdir()
    for number in range(4):
        draw(folder, f"{number}.png", (64, 64), "a picture")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 64))
        mask.save(masks / f"{number}.png")
    config = make_config(train_data_dir=folder, mask_data_dir=masks)
    found = stages.precompute(config)
    example = CachedExamples(found.cache, found.entries).read(0)
    assert example["loss_mask"].shape == (1, 16, 16)
    assert (example["loss_mask"][..., :8] == 1).all()
    assert (example["loss_mask"][..., 8:] == 0).all()
    schedule = PretrainedSdxl(config.model).load_noise_schedule()
    batch = objective.draw_visit(example, seeds.visit_generator(0, 0), schedule)
    prediction, target = torch.randn(2, 1, 4, 16, 16)
    errors = diffusion.squared_errors(prediction, target, batch.loss_mask)
    torch.testing.assert_close(errors[0], ((prediction - target)[..., :8] ** 2).sum() / target.numel())
    assert finite(list(stages.train(config)))
    (masks / "2.png").unlink()
    with_gap = stages.precompute(config)
    assert any(finding.source == "2.png" and "mask" in finding.problem for finding in with_gap.findings)


def test_a_crop_where_the_mask_is_black_does_not_cost_the_image(make_config, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(3):
        draw(tmp_path / "wide", f"{number}.png", (320, 64), "a wide picture")
        mask = Image.new("L", (320, 64))
        mask.paste(255, (0, 0, 20, 64))
        mask.save(masks / f"{number}.png")
    settings = {"train_data_dir": tmp_path / "wide", "mask_data_dir": masks, "random_crop": True}
    assert len(stages.precompute(make_config(**settings, crop_variants=2)).entries) == 3
    assert len(stages.precompute(make_config(**settings, crop_variants=6)).entries) == 3
    Image.new("L", (320, 64)).save(masks / "1.png")
    assert [entry.source for entry in stages.precompute(make_config(**settings)).entries] == [
        "0.png",
        "2.png",
    ]


def test_the_alpha_channel_is_the_mask_when_asked(make_config, tmp_path):
    for number in range(3):
        draw(tmp_path / "alpha", f"{number}.png", (64, 64), "a cut-out", mode="RGBA")
    config = make_config(train_data_dir=tmp_path / "alpha", alpha_mask=True)
    found = stages.precompute(config)
    assert CachedExamples(found.cache, found.entries).read(0)["loss_mask"].shape == (1, 16, 16)
    assert finite(list(stages.train(config)))


def test_crops_flips_captions_and_shuffles_are_variants_of_one_example(make_config, tmp_path):
    draw(tmp_path / "tags", "a.png", (100, 64), "ink, red, star, blue\na drawing of a star")
    draw(tmp_path / "tags", "b.png", (64, 64), "ink, green, ring, white")
    settings = {"random_crop": True, "random_flip": True, "crop_variants": 3, "shuffle_caption": True}
    config = make_config(
        train_data_dir=tmp_path / "tags", caption_variants=3, keep_tokens=1, num_repeats=2, **settings
    )
    found = stages.precompute(config)
    first, second = found.entries
    assert (len(first.image_keys), len(second.image_keys)) == (6, 2)
    assert (len(first.captions), len(second.captions)) == (4, 3)
    assert all(caption.startswith("ink") for caption in second.captions)
    assert first.repeats == 2
    assert finite(list(stages.train(config)))
    log = (config.paths.output_dir / "summary.json").read_text()
    assert json.loads(log)["training_examples"] == 2


@pytest.mark.parametrize(("limit", "length"), [(77, 77), (150, 152), (225, 227)])
def test_long_captions_train_at_every_length_and_what_is_cut_is_told(make_config, tmp_path, limit, length):
    caption = " ".join(f"word{number}" for number in range(90))
    draw(tmp_path / "long", "a.png", (64, 64), caption)
    draw(tmp_path / "long", "b.png", (64, 64), "short")
    config = make_config(train_data_dir=tmp_path / "long", max_token_length=limit, caption_dropout_rate=0.5)
    found = stages.precompute(config)
    assert CachedExamples(found.cache, found.entries).read(1)["prompt_embeds"].shape[0] == length
    cut = [finding for finding in found.findings if "too long" in finding.problem]
    assert [finding.source for finding in cut] == ["a.png"]
    assert cut[0].action.endswith("word89")
    assert finite(list(stages.train(config)))


def test_the_mean_of_the_posterior_can_be_learned_from(make_config):
    config = make_config(latent_mode="mean")
    training = stages.prepare_training(config)
    example = training.examples.read(0)
    visits = [
        objective.draw_visit(example, seeds.visit_generator(0, number), training.schedule, latent_mode="mean")
        for number in range(2)
    ]
    mean = example["moments"][:4] * training.schedule.scaling_factor
    assert all(torch.equal(visit.latents[0], mean) for visit in visits)
    assert not torch.equal(visits[0].noise, visits[1].noise)
