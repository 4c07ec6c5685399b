"""The little world that the tiny SDXL has learned: coloured shapes on backgrounds, 64 px.

Drawn larger and averaged down, so edges are smooth; lengths are in pixels of the 64 px picture. Every picture
is a function of a scene and a NumPy generator, so the order of its draws may not change: the weights in this
folder and the demo's figures belong to it. Two styles: the base model knows ``draw_plain`` alone; the demo
data set is ``draw_ink``.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE_PX = 64
SUPERSAMPLING = 4
"""Pixels that are drawn, along each side, for one of the picture."""

RGB = tuple[int, int, int]
# Far apart, so that the nearest colour is the right one after all that a VAE of this size does to it.
COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "purple": (140, 50, 190),
    "black": (22, 22, 26),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PATTERNS = ("stripes", "dots", "checks")
PAPER: RGB = (244, 230, 200)
"""Cream, and no colour of the palette: only who learned the style can have drawn it."""
INK: RGB = (60, 40, 34)


@dataclass(frozen=True)
class Scene:
    """What a picture shows, in the words of its caption."""

    shape: str
    colour: str
    background: str
    pattern: str | None = None
    """On the background, and None together with its colour."""
    pattern_colour: str | None = None
    outline: str | None = None
    """A colour."""

    @property
    def caption(self) -> str:
        """For example ``a red star on a blue background``."""
        outline = f" with a {self.outline} outline" if self.outline else ""
        pattern = f" with {self.pattern_colour} {self.pattern}" if self.pattern else ""
        article = "an" if self.colour[0] in "aeiou" else "a"
        ground_article = "an" if self.background[0] in "aeiou" else "a"
        figure = f"{article} {self.colour} {self.shape}{outline}"
        ground = f"{ground_article} {self.background} background{pattern}"
        return f"{figure} on {ground}"


@dataclass(frozen=True)
class Placement:
    """Where a shape sits, in pixels of the finished picture."""

    x_px: float
    y_px: float
    radius_px: float


def plain_scenes() -> list[Scene]:
    """All 336 scenes of one shape on a background of another colour, in a fixed order."""
    return [
        Scene(shape, colour, background)
        for shape in SHAPES
        for colour in COLOURS
        for background in COLOURS
        if background != colour
    ]


def random_scene(random: np.random.Generator) -> Scene:
    """A scene of the base model's world: 70 % without pattern, 85 % without outline."""
    colour, background = random.choice(list(COLOURS), 2, replace=False).tolist()
    shape = str(random.choice(SHAPES))

    # All colours of a picture differ: a caption that names a colour twice could not be told apart.
    pattern = None
    pattern_colour = None
    if random.random() < 0.30:
        pattern = str(random.choice(PATTERNS))
        others = [name for name in COLOURS if name not in (colour, background)]
        pattern_colour = str(random.choice(others))

    outline = None
    if random.random() < 0.15:
        others = [name for name in COLOURS if name not in (colour, background, pattern_colour)]
        outline = str(random.choice(others))
    return Scene(shape, colour, background, pattern, pattern_colour, outline)


def random_placement(random: np.random.Generator) -> Placement:
    """Near the middle, of a size that leaves some background on every side."""
    x_px, y_px = random.uniform(SIZE_PX / 2 - 5, SIZE_PX / 2 + 5, 2).tolist()
    return Placement(x_px, y_px, random.uniform(16, 22))


def draw_plain(scene: Scene, random: np.random.Generator) -> Image.Image:
    """The base style: flat colours, each off its palette entry by at most 12 of 255; RGB, 64 x 64."""
    # From back to front: ground, pattern, outline, shape.
    canvas = Image.new("RGB", _canvas_size(), _jitter(COLOURS[scene.background], random))
    if scene.pattern and scene.pattern_colour:
        canvas.paste(_jitter(COLOURS[scene.pattern_colour], random), mask=_pattern(scene.pattern, random))
    mask = shape_mask(scene.shape, random_placement(random))
    if scene.outline:
        canvas.paste(_jitter(COLOURS[scene.outline], random), mask=_outer(mask, random.uniform(1.5, 3)))
    canvas.paste(_jitter(COLOURS[scene.colour], random), mask=mask)
    return _finish(canvas)


def draw_ink(scene: Scene, random: np.random.Generator, size_px: int = SIZE_PX) -> Image.Image:
    """The demo style: a flat shape with a dark outline on hatched cream paper, whatever the background says.

    Drawn at any size, so that a full-size SDXL can learn it too; RGB.
    """
    scale = max(
        SUPERSAMPLING, 2 * size_px // SIZE_PX
    )  # large pictures too are averaged down, 2 to 1 at least
    canvas = Image.new("RGB", _canvas_size(scale), PAPER)
    hatching = stripes(45, period_px=10, width_px=2.5, shift_px=random.uniform(0, 10), scale=scale)
    canvas.paste(INK, mask=hatching)
    mask = shape_mask(scene.shape, random_placement(random), scale)
    canvas.paste(INK, mask=_outer(mask, 3, scale))
    canvas.paste(COLOURS[scene.colour], mask=mask)
    return canvas.resize((size_px, size_px), Image.Resampling.BOX)


def draw_doodle(random: np.random.Generator) -> Image.Image:
    """Any colours, lines at any angle, any shapes: what an autoencoder should be able to keep."""
    canvas = Image.new("RGB", _canvas_size(), _any_colour(random))
    period_px = random.uniform(5, 16)
    angle_degrees = random.choice([0, 45, 90, 135, random.uniform(0, 180)])
    lines = stripes(
        angle_degrees, period_px, random.uniform(1.2, period_px / 2), random.uniform(0, period_px)
    )
    canvas.paste(_any_colour(random), mask=lines)
    for _ in range(random.integers(1, 4)):
        # Anywhere, over the edge and over each other too.
        x_px, y_px = random.uniform(0, SIZE_PX, 2).tolist()
        mask = shape_mask(str(random.choice(SHAPES)), Placement(x_px, y_px, random.uniform(8, 24)))
        canvas.paste(_any_colour(random), mask=_outer(mask, random.uniform(1, 3)))
        canvas.paste(_any_colour(random), mask=mask)
    return _finish(canvas)


def shape_mask(shape: str, placement: Placement, scale: int = SUPERSAMPLING) -> Image.Image:
    """Where the shape is: mode L, 255 inside, at ``scale`` times the picture's size."""
    mask = Image.new("L", _canvas_size(scale), 0)
    pen = ImageDraw.Draw(mask)
    x = scale * placement.x_px
    y = scale * placement.y_px
    r = scale * placement.radius_px
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    if shape == "ring":
        hole = 0.5 * r
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    if shape == "square":
        half_side = 0.85 * r  # which covers about as much as the circle
        pen.rectangle((x - half_side, y - half_side, x + half_side, y + half_side), fill=255)
    if shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=255)
    if shape == "star":
        corners = []
        for number in range(10):  # five points and five notches, clockwise from the top
            distance = r if number % 2 == 0 else 0.42 * r
            angle = math.pi * number / 5
            corners.append((x + distance * math.sin(angle), y - distance * math.cos(angle)))
        pen.polygon(corners, fill=255)
    if shape == "cross":
        arm = 0.34 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
    return mask


def stripes(
    angle_degrees: float, period_px: float, width_px: float, shift_px: float, scale: int = SUPERSAMPLING
) -> Image.Image:
    """Parallel lines as a mask of mode L, at ``scale`` times the picture's size.

    Args:
        angle_degrees: Of the direction across the lines, clockwise from the right: 0 draws upright lines.
        period_px: From line to line, across them.
        width_px: Of a line.
        shift_px: Of all lines, across them.
        scale: Pixels that are drawn for one of the picture.
    """
    across = _ramp(angle_degrees, scale) + shift_px
    return _to_mask(across % period_px < width_px)


def _pattern(pattern: str, random: np.random.Generator) -> Image.Image:
    period_px = random.uniform(7, 12)
    first_px, second_px = random.uniform(0, period_px, 2)  # where it begins, so that no two look alike
    if pattern == "stripes":
        angle_degrees = random.choice([0, 45, 90, 135])
        return stripes(angle_degrees, period_px, period_px * random.uniform(0.2, 0.5), first_px)

    across = _ramp(0) + first_px
    down = _ramp(90) + second_px
    if pattern == "checks":
        return _to_mask((across // period_px + down // period_px) % 2 < 1)
    dots = (across % period_px - period_px / 2) ** 2 + (down % period_px - period_px / 2) ** 2
    return _to_mask(dots < (0.28 * period_px) ** 2)  # a squared distance from the middle of its square


def _canvas_size(scale: int = SUPERSAMPLING) -> tuple[int, int]:
    return SIZE_PX * scale, SIZE_PX * scale


def _ramp(angle_degrees: float, scale: int = SUPERSAMPLING) -> np.ndarray:
    """How far along a direction each drawn pixel lies, in pixels of the picture."""
    rows, columns = np.mgrid[0 : SIZE_PX * scale, 0 : SIZE_PX * scale] / scale
    angle = math.radians(angle_degrees)
    return rows * math.sin(angle) + columns * math.cos(angle)


def _to_mask(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * 255)


def _outer(mask: Image.Image, width_px: float, scale: int = SUPERSAMPLING) -> Image.Image:
    """The mask, wider by so much all around."""
    # Sigma is half of the width: two sigma outside of it, a straight edge is blurred to 2.3 % of its height.
    blurred = mask.filter(ImageFilter.GaussianBlur(width_px * scale / 2))
    return _to_mask(np.asarray(blurred) > 0.023 * 255)


def _jitter(colour: RGB, random: np.random.Generator) -> RGB:
    red, green, blue = np.clip(np.array(colour) + random.integers(-12, 13, 3), 0, 255).tolist()
    return red, green, blue


def _any_colour(random: np.random.Generator) -> RGB:
    red, green, blue = random.integers(0, 256, 3).tolist()
    return red, green, blue


def _finish(canvas: Image.Image) -> Image.Image:
    return canvas.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
