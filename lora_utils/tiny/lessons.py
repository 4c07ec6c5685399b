"""What the tiny U-Net is shown: captioned pictures of every size, some cropped or once smaller, as SDXL was.

So that time ids mean something (Podell et al., 2023, section 2.2): a picture whose original was small is
blurred, one that was cropped shows its shape off the middle or cut. And so that unknown words mean something:
a made-up one, or the word ``shape``, is any of the world's shapes.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from lora_utils.tiny.drawing import SUBJECT, Size
from lora_utils.tiny.world import LANDSCAPE, PORTRAIT, SQUARE, draw_plain, random_scene

SIZE_SHARES = {SQUARE: 0.6, LANDSCAPE: 0.2, PORTRAIT: 0.2}
CROPPED_SHARE = 0.25
LARGEST_CROP_PX = 32
SMALLER_SHARE = 0.2
"""Of originals smaller than the picture, which was enlarged and is blurred."""
LARGER_SHARE = 0.4
"""Of originals larger than the picture: they look the same as those of its own size."""
MADE_UP_SHARE = 0.08
"""Of captions that call the shape by a word that nobody knows."""
GENERIC_SHARE = 0.04
"""Of captions that call the shape a shape."""


@dataclass(frozen=True)
class Lesson:
    """One training example of the U-Net."""

    picture: Image.Image
    caption: str
    time_ids: tuple[int, int, int, int, int, int]
    """Original height and width, crop's top and left, target height and width; pixels."""


def random_lesson(random: np.random.Generator, size: Size) -> Lesson:
    """A picture of the base style, of this size."""
    scene = random_scene(random)
    canvas = size
    top_px = 0
    left_px = 0
    if random.random() < CROPPED_SHARE:
        extra_px = int(random.integers(4, LARGEST_CROP_PX + 1))
        shift_px = int(random.integers(0, extra_px + 1))
        if random.random() < 0.5:
            canvas = Size(size.height_px + extra_px, size.width_px)
            top_px = shift_px
        else:
            canvas = Size(size.height_px, size.width_px + extra_px)
            left_px = shift_px

    picture = draw_plain(scene, random, canvas)
    original_draw = random.random()
    factor = 1.0
    if original_draw < SMALLER_SHARE:
        factor = random.uniform(0.25, 0.85)
    elif original_draw < SMALLER_SHARE + LARGER_SHARE:
        factor = float(np.exp(random.uniform(0, np.log(32))))
    original = (round(canvas.height_px * factor), round(canvas.width_px * factor))
    if factor < 1:
        small = picture.resize((original[1], original[0]), Image.Resampling.BOX)
        picture = small.resize(picture.size, Image.Resampling.BICUBIC)
    picture = picture.crop((left_px, top_px, left_px + size.width_px, top_px + size.height_px))

    word = scene.shape
    word_draw = random.random()
    if word_draw < MADE_UP_SHARE:
        word = made_up_word(random)
    elif word_draw < MADE_UP_SHARE + GENERIC_SHARE:
        word = "shape"
    caption = replace(scene, shape=word).caption
    return Lesson(picture, caption, (*original, top_px, left_px, size.height_px, size.width_px))


def made_up_word(random: np.random.Generator) -> str:
    """Two or three syllables that can be said, and never the subject's own word."""
    while True:
        syllables = [
            str(random.choice(list("bdfgklmnprstvz"))) + str(random.choice(list("aeiou")))
            for _ in range(random.integers(2, 4))
        ]
        word = "".join(syllables)
        if word != SUBJECT:
            return word
