"""Precompute as a stage: what is encoded, what is reused, what is left out, what comes out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils import cache, precomputing, stages
from lora_utils.sources.examples import DataError
from lora_utils.visits import CachedExamples
from tests.conftest import TINY


@pytest.fixture
def pictures(data_dir, tmp_path):
    """The ten pictures, in a folder of their own."""
    folder = tmp_path / "pictures"
    shutil.copytree(data_dir, folder)
    return folder


@pytest.fixture
def base(tmp_path):
    """A base model that a test may change."""
    folder = tmp_path / "base"
    shutil.copytree(TINY, folder)
    return folder


def encoded(config):
    found = stages.precompute(config)
    return found.encoded_images, found.encoded_captions


def touch_weights(folder: Path):
    """Another value in the last weight of a part."""
    [file] = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def one_pixel(folder, **_):
    image = Image.open(folder / "ink_03.png")
    image.putpixel((5, 5), (255, 0, 255))
    image.save(folder / "ink_03.png")


MUTATIONS = {
    "one pixel": (one_pixel, {}, (1, 0)),
    "a caption": (lambda folder, **_: (folder / "ink_03.txt").write_text("new"), {}, (0, 1)),
    "a caption that another image has": (
        lambda folder, **_: shutil.copy(folder / "ink_01.txt", folder / "ink_03.txt"),
        {},
        (0, 0),
    ),
    "another name": (lambda folder, **_: rename(folder, "ink_02.jpg", "renamed.jpg"), {}, (0, 0)),
    "a new image": (lambda folder, **_: add_image(folder), {}, (1, 1)),
    "a removed image": (lambda folder, **_: (folder / "ink_04.jpg").unlink(), {}, (0, 0)),
    "the VAE": (lambda base, **_: touch_weights(base / "vae"), {}, (10, 0)),
    "the first text encoder": (lambda base, **_: touch_weights(base / "text_encoder"), {}, (0, 10)),
    "the second text encoder": (lambda base, **_: touch_weights(base / "text_encoder_2"), {}, (0, 10)),
    "the U-Net": (lambda base, **_: touch_weights(base / "unet"), {}, (0, 0)),
    "resolution": (None, {"resolution": 32}, (10, 0)),
    "buckets of the same shape": (
        None,
        {"enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 8},
        (0, 0),
    ),
    "dtype": (None, {"mixed_precision": "bf16"}, (10, 10)),
    "max_token_length": (None, {"max_token_length": 150}, (0, 10)),
    "a trigger word": (None, {"trigger_word": "inkk"}, (0, 10)),
    "a mirrored variant": (None, {"random_flip": True}, (10, 0)),
    "the background of images without alpha": (None, {"alpha_background": "black"}, (0, 0)),
    "seed, split, dropout, repeats": (
        None,
        {"seed": 5, "validation_split": 0.2, "caption_dropout_rate": 0.5, "num_repeats": 3},
        (0, 0),
    ),
}


def rename(folder, old, new):
    for suffix in (".txt", Path(old).suffix):
        (folder / old).with_suffix(suffix).rename((folder / new).with_suffix(suffix))


def add_image(folder):
    Image.new("RGB", (64, 64), "green").save(folder / "new.png")
    (folder / "new.txt").write_text("a green square")


@pytest.mark.parametrize(("change", "settings", "expected"), MUTATIONS.values(), ids=MUTATIONS)
def test_exactly_what_is_affected_is_encoded_again(make_config, pictures, base, change, settings, expected):
    shared = {"train_data_dir": pictures, "pretrained_model_name_or_path": str(base), "precompute_dir": None}
    assert encoded(make_config(**shared)) == (10, 10)
    assert encoded(make_config(**shared)) == (0, 0)
    if change:
        change(folder=pictures, base=base)
    assert encoded(make_config(**shared, **settings)) == expected
    assert encoded(make_config(**shared, **settings)) == (0, 0)


def test_another_schema_is_encoded_again(make_config, pictures, monkeypatch):
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    assert encoded(config) == (10, 10)
    monkeypatch.setattr(cache, "SCHEMA", cache.SCHEMA + 1)
    assert encoded(config) == (10, 10)


def test_what_is_kept_is_what_the_pipeline_would_compute(make_config, tiny_pipeline):
    found = stages.precompute(make_config())
    assert len(found.entries) == 10
    example = CachedExamples(found.cache, found.entries).read(0)
    embeds, _, pooled, _ = tiny_pipeline.encode_prompt(found.entries[0].captions[0], do_classifier_free_guidance=False)
    torch.testing.assert_close(example["prompt_embeds"], embeds[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(example["pooled_prompt_embeds"], pooled[0], rtol=1e-5, atol=1e-5)
    assert example["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]


def test_moments_are_those_of_the_cropped_pixels(make_config, pictures, tiny_pipeline):
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (96, 64, 3), dtype=np.uint8)).save(pictures / f"tall{number}.png")
        (pictures / f"tall{number}.txt").write_text("noise")
    found = stages.precompute(make_config(train_data_dir=pictures))
    number = next(n for n, entry in enumerate(found.entries) if entry.source == "tall1.png")
    pixels = np.asarray(Image.open(pictures / "tall1.png"))[16:80]
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = tiny_pipeline.vae.encode(tensor).latent_dist.parameters[0]
    example = CachedExamples(found.cache, found.entries).read(number)
    torch.testing.assert_close(example["moments"], expected, rtol=1e-4, atol=1e-4)
    assert example["time_ids"].tolist() == [96, 64, 16, 0, 64, 64]


def test_a_damaged_image_is_left_out_by_name_and_the_rest_goes_on(make_config, pictures):
    for name in ("ink_01.png", "ink_02.jpg"):
        content = (pictures / name).read_bytes()
        (pictures / name).write_bytes(content[: len(content) // 2])
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    for _ in range(2):  # the second time from the cache
        found = stages.precompute(config)
        assert len(found.entries) == 8
        refused = {finding.source for finding in found.findings if finding.kind == "refused"}
        assert refused == {"ink_01.png", "ink_02.jpg"}
        assert "ink_01.png" in str(found)
    assert found.encoded_images == 0
    report = (config.paths.output_dir / "data_report.csv").read_text(encoding="utf-8-sig")
    assert "ink_01.png,refused" in report


def test_training_tells_what_it_leaves_out(make_config, pictures, caplog):
    (pictures / "ink_01.png").write_bytes(b"no image")
    next(stages.train(make_config(train_data_dir=pictures)))
    assert "1 examples are left out" in caplog.text
    assert "ink_01.png" in caplog.text


def test_what_was_fixed_is_told_again_from_the_cache(make_config, pictures):
    Image.new("RGBA", (64, 64), (255, 0, 0, 100)).save(pictures / "clear.png")
    (pictures / "clear.txt").write_text("a see-through square")
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    first, second = stages.precompute(config), stages.precompute(config)
    assert any(finding.source == "clear.png" and "white" in finding.action for finding in first.findings)
    assert second.findings == first.findings


def test_nothing_usable_is_an_error_that_names_all(make_config, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"no image")
        (folder / f"{number}.txt").write_text("a caption")
    with pytest.raises(DataError, match=r"1\.png"):
        stages.precompute(make_config(train_data_dir=folder))


def test_damaged_records_are_encoded_anew_and_told(make_config, pictures):
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    found = stages.precompute(config)
    before = {key: found.cache.read(key) for entry in found.entries for key in (*entry.image_keys, *entry.text_keys)}
    for path in found.folder.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 0x40
        path.write_bytes(content)
    again = stages.precompute(config)
    assert again.encoded_images > 0
    assert again.encoded_captions > 0
    assert any(finding.problem == "damaged in the cache" for finding in again.findings)
    for key, record in before.items():
        for name, tensor in again.cache.read(key).items():
            assert torch.equal(tensor, record[name])


def test_a_vae_that_overflows_is_named_with_its_cure(make_config, pictures, monkeypatch):
    from lora_utils import imagestore

    def overflow(vae, pixels):
        moments = torch.zeros(len(pixels), 8, 16, 16)
        moments[pixels[:, 0, 5, 5] > 0] = float("nan")
        return moments

    monkeypatch.setattr(imagestore, "encode_images", overflow)
    found = stages.precompute(make_config(train_data_dir=pictures, precompute_dir=None))
    refused = [finding for finding in found.findings if finding.kind == "refused"]
    assert refused
    assert len(refused) + len(found.entries) == 10
    assert all("sdxl-vae-fp16-fix" in finding.action and finding.source for finding in refused)


def test_held_out_images_stay_held_out_when_captions_change(make_config, pictures):
    config = make_config(train_data_dir=pictures, validation_split=0.3)
    before = [entry.source for entry in stages.precompute(config).entries if entry.held_out]
    for path in pictures.glob("*.txt"):
        path.write_text("something else")
    after = [entry.source for entry in stages.precompute(config).entries if entry.held_out]
    assert len(before) == 3
    assert after == before


def test_holding_everything_out_is_refused(make_config, data_dir, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("ink_01.png", "ink_01.txt"):
        shutil.copy(data_dir / name, folder)
    with pytest.raises(DataError, match="no image to train on"):
        stages.precompute(make_config(train_data_dir=folder, validation_split=0.1))


def test_a_large_cache_is_checked_when_training_reads_it(make_config, pictures, monkeypatch):
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    found = stages.precompute(config)
    for path in found.folder.glob("images-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-600] + bytes(600))
    monkeypatch.setattr(precomputing, "VERIFIED_BYTES", 0)
    with pytest.raises(cache.CacheError, match="run the same command again"):
        list(stages.train(config))
    reports = list(stages.train(config))  # the same command
    assert len(reports) == 3
    assert json.loads((config.paths.output_dir / "summary.json").read_text())["status"] == "done"
