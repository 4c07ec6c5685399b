"""The cache after a change: exactly what is affected is encoded again."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lora_utils import stages
from lora_utils.precompute import cache
from tests.conftest import TINY


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
    "what stands for no prompt": (lambda base, **_: no_zeros(base), {}, (0, 10)),
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


def no_zeros(base):
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))


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


def test_another_variant_of_the_weights_is_encoded_again(make_config, pictures, base):
    for part in ("vae", "text_encoder", "text_encoder_2", "unet"):
        [file] = (base / part).glob("*.safetensors")
        shutil.copy(file, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    shared = {"train_data_dir": pictures, "pretrained_model_name_or_path": str(base), "precompute_dir": None}
    assert encoded(make_config(**shared)) == (10, 10)
    assert encoded(make_config(**shared, variant="fp16")) == (10, 10)
