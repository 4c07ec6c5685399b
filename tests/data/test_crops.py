"""Shapes, crops and time_ids, against PIL and tables computed by hand."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from lora_utils.config.loading import load_config
from lora_utils.data.crops import bucket_sizes, choose_size, cropped_share, plan_crops
from lora_utils.data.images import ImageError

HASH = "0123456789abcdef" * 4
SDXL = {"resolution": 1024, "enable_bucket": True}


def data(**settings):
    return load_config(None, settings).data


def first_crop(original, **settings):
    config = data(**settings)
    return plan_crops(original, choose_size(original, config), HASH, config)[0]


def picture(width, height):
    steps = np.random.default_rng(0).normal(0, 2, (height, width, 3))
    return Image.fromarray((128 + steps.cumsum(axis=0).cumsum(axis=1) / 8).clip(40, 215).astype(np.uint8))


@pytest.mark.parametrize(
    ("original", "settings", "size", "time_ids"),
    [
        # original width and height -> time_ids: original height, width; crop top, left; target height, width
        ((1024, 1024), {"resolution": 1024}, (1024, 1024), (1024, 1024, 0, 0, 1024, 1024)),
        ((2048, 1024), {"resolution": 1024}, (1024, 1024), (1024, 2048, 0, 512, 1024, 1024)),
        ((600, 900), {"resolution": 512}, (512, 512), (900, 600, 128, 0, 512, 512)),
        ((1280, 720), {"resolution": "1280x720"}, (1280, 720), (720, 1280, 0, 0, 720, 1280)),
        ((1920, 1080), {"resolution": "1280 720"}, (1280, 720), (1080, 1920, 0, 0, 720, 1280)),
        ((1000, 1000), {"resolution": [1280, 720]}, (1280, 720), (1000, 1000, 280, 0, 720, 1280)),
        ((1024, 1024), SDXL, (1024, 1024), (1024, 1024, 0, 0, 1024, 1024)),
        ((3000, 2000), SDXL, (1216, 832), (2000, 3000, 0, 16, 832, 1216)),
        ((2000, 3000), SDXL, (832, 1216), (3000, 2000, 16, 0, 1216, 832)),
        ((1920, 1080), SDXL, (1344, 768), (1080, 1920, 0, 10, 768, 1344)),
        ((100, 400), SDXL, (512, 2048), (400, 100, 0, 0, 2048, 512)),
        ((700, 500), SDXL | {"bucket_no_upscale": True}, (640, 448), (500, 700, 4, 0, 448, 640)),
        ((2400, 1600), SDXL | {"bucket_no_upscale": True}, (1216, 832), (1600, 2400, 0, 16, 832, 1216)),
    ],
)
def test_shape_and_time_ids_are_those_computed_by_hand(original, settings, size, time_ids):
    crop = first_crop(original, **settings)
    assert crop.size == size
    assert crop.time_ids == time_ids


def test_buckets_cover_the_grid_both_ways_within_the_area():
    sizes = bucket_sizes((1024, 1024), 256, 2048, 64)
    assert {
        (1024, 1024),
        (1152, 896),
        (896, 1152),
        (1216, 832),
        (1344, 768),
        (1536, 640),
        (512, 2048),
    } <= set(sizes)
    assert all(width % 64 == height % 64 == 0 for width, height in sizes)
    assert all(256 <= side <= 2048 for size in sizes for side in size)
    assert all(
        0.9 * 2**20 < width * height <= 2**20 for width, height in sizes if 2048 not in (width, height)
    )
    assert {(height, width) for width, height in sizes} == set(sizes)


def test_the_bucket_nearest_in_shape_is_chosen():
    config = data(**SDXL)
    sizes = bucket_sizes((1024, 1024), 256, 2048, 64)
    for original in [(640, 480), (997, 1013), (333, 1000), (4000, 900)]:
        chosen = choose_size(original, config)
        lost = {size: cropped_share(original, size) for size in sizes}
        assert lost[chosen] == pytest.approx(min(lost.values()))


def test_without_upscale_no_image_grows():
    config = data(**SDXL, bucket_no_upscale=True)
    for original in [(70, 300), (640, 480), (1024, 1024), (5000, 3000)]:
        width, height = choose_size(original, config)
        assert width <= original[0]
        assert height <= original[1]


@pytest.mark.parametrize(
    ("original", "settings", "reason"),
    [
        ((60, 60), {"resolution": 1024}, "far too small"),
        ((600, 40), SDXL | {"bucket_no_upscale": True}, "too narrow"),
    ],
)
def test_what_fits_no_shape_is_refused(original, settings, reason):
    with pytest.raises(ImageError, match=reason):
        choose_size(original, data(**settings))


@pytest.mark.parametrize("original", [(200, 100), (100, 137), (64, 64), (31, 40)])
@pytest.mark.parametrize("flip", [False, True])
def test_cutting_is_resizing_and_then_cropping(original, flip):
    image = picture(*original)
    crop = plan_crops(original, (64, 48), HASH, data(resolution=64, random_flip=True))[int(flip)]
    whole = (ImageOps.mirror(image) if flip else image).resize(crop.resized, Image.Resampling.LANCZOS)
    expected = whole.crop((crop.left, crop.top, crop.left + 64, crop.top + 48))
    assert crop.flip == flip
    difference = np.abs(crop.apply(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 2  # PIL may take the other axis first, and rounds in between


def test_a_long_strip_is_not_blown_up():
    image = Image.new("RGB", (40_000, 130), "red")
    crop = first_crop(image.size, resolution=1024)
    assert crop.resized[0] > 300_000
    assert crop.apply(image).shape == (1024, 1024, 3)


def test_random_crops_differ_lie_inside_and_do_not_depend_on_anything_but_the_image():
    config = data(resolution=64, random_crop=True, crop_variants=8)
    crops = plan_crops((200, 100), (64, 64), HASH, config)
    assert crops == plan_crops((200, 100), (64, 64), HASH, config)
    assert len({(crop.left, crop.top) for crop in crops}) > 4
    assert all(0 <= crop.left <= crop.resized[0] - 64 and crop.top == 0 for crop in crops)
    assert crops != plan_crops((200, 100), (64, 64), HASH[::-1], config)
    assert len(plan_crops((64, 64), (64, 64), HASH, config)) == 1  # no room to move


def test_a_mirrored_crop_shows_the_same_part_and_says_where_it_lies():
    image = picture(200, 100)
    plain, mirrored = plan_crops((200, 100), (64, 64), HASH, data(resolution=64, random_flip=True))
    np.testing.assert_allclose(
        mirrored.apply(image)[:, ::-1].astype(int), plain.apply(image).astype(int), atol=2
    )
    assert mirrored.time_ids[3] == plain.resized[0] - 64 - plain.left


def test_a_mask_is_cut_like_its_image():
    mask = Image.new("L", (128, 64))
    mask.paste(255, (32, 0, 64, 64))
    crop = first_crop((128, 64), resolution=64)
    cut = crop.apply_to_mask(mask, 8)
    assert cut.shape == (8, 8)
    assert (cut[:, :4] == 255).all()
    assert (cut[:, 4:] == 0).all()
