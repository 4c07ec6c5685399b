"""Near duplicates: the same picture again is found, another one is not, however many there are."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from lora_utils.data.duplicates import near_duplicates, perceptual_hash
from tests.data.image_corpus import PICTURE, save


def drawn(shape, size=(300, 200)):
    canvas = Image.new("RGB", (300, 200), "beige")
    getattr(ImageDraw.Draw(canvas), shape)((60, 20, 220, 180), fill="navy")
    return canvas.resize(size, Image.Resampling.LANCZOS)


def test_a_picture_that_was_resized_or_recompressed_is_a_near_duplicate():
    drawing = drawn("ellipse")
    photo = Image.fromarray(PICTURE).resize((300, 200))
    for picture in (drawing, photo):
        others = [
            picture.resize((150, 100)),
            picture.resize((613, 411)),
            Image.open(BytesIO(save(picture, "JPEG", quality=30))),
        ]
        prints = [perceptual_hash(image) for image in (picture, *others)]
        assert near_duplicates(prints) == [(i, j) for i in range(4) for j in range(i + 1, 4)]


def test_other_pictures_are_no_near_duplicates_even_if_flat():
    shapes = [drawn("ellipse"), drawn("rectangle"), drawn("ellipse").rotate(180, fillcolor="beige")]
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("white", "black", "red", "beige", "#808080")]
    gradient = Image.fromarray(PICTURE)
    everything = [*shapes, *flat, gradient, gradient.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    assert near_duplicates([perceptual_hash(image) for image in everything]) == []


def test_near_duplicates_among_many_are_few_but_linked():
    generator = np.random.default_rng(0)
    prints = [(int.from_bytes(generator.bytes(8), "big"), generator.bytes(192)) for _ in range(2000)]
    number, thumbnail = prints[7]
    prints += [(number ^ 0b1_0000_0000_0000_0001, thumbnail), (number ^ 0b1111, thumbnail)]
    alike = [(0, bytes(192))] * 2000
    assert near_duplicates(prints) == [(7, 2000)]
    pairs = near_duplicates(alike)
    assert len(pairs) <= 32 * 2000
    assert {(i, i + 1) for i in range(1999)} <= set(pairs)
