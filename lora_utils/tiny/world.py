"""The little world that the tiny SDXL has learned: coloured shapes on backgrounds, 64 px.

Drawn larger and averaged down, so edges are smooth; lengths are in pixels of the 64 px picture. Every picture is
a function of a scene and a NumPy generator. Two styles: the base model knows ``draw_plain`` alone; the demo data
set is ``draw_ink``.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE_PX = 64
SUPERSAMPLING = 4

RGB = tuple[int, int, int]
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
INK: RGB = (60, 40, 34)


@dataclass(frozen=True)
class Scene:
    """What a picture shows, in the words of its caption."""

    shape: str
    colour: str
    background: str
    pattern: str | None = None
    pattern_colour: str | None = None
    outline: str | None = None

    @property
    def caption(self) -> str:
        """For example ``a red star on a blue background``."""
        outline = f" with a {self.outline} outline" if self.outline else ""
        pattern = f" with {self.pattern_colour} {self.pattern}" if self.pattern else ""
        article = "an" if self.colour[0] in "aeiou" else "a"
        ground = "an" if self.background[0] in "aeiou" else "a"
        return (
            f"{article} {self.colour} {self.shape}{outline} on {ground} {self.background} background{pattern}"
        )


@dataclass(frozen=True)
class Placement:
    """Where a shape sits, in pixels of the finished picture."""

    x_px: float
    y_px: float
    radius_px: float


def plain_scenes() -> list[Scene]:
    """All 336 scenes of one shape on a background of another colour, in a fixed order."""
    return [Scene(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if b != c]


def random_scene(random: np.random.Generator) -> Scene:
    """A scene of the base model's world: 70 % without pattern, 85 % without outline."""
    colour, background = random.choice(list(COLOURS), 2, replace=False).tolist()
    shape = str(random.choice(SHAPES))
    pattern = outline = pattern_colour = None
    if random.random() < 0.30:
        pattern = str(random.choice(PATTERNS))
        pattern_colour = str(random.choice([name for name in COLOURS if name not in (colour, background)]))
    if random.random() < 0.15:
        outline = str(
            random.choice([name for name in COLOURS if name not in (colour, background, pattern_colour)])
        )
    return Scene(shape, colour, background, pattern, pattern_colour, outline)


def random_placement(random: np.random.Generator) -> Placement:
    """Near the middle, of a size that leaves some background on every side."""
    x_px, y_px = random.uniform(SIZE_PX / 2 - 5, SIZE_PX / 2 + 5, 2).tolist()
    return Placement(x_px, y_px, random.uniform(16, 22))


def draw_plain(scene: Scene, random: np.random.Generator) -> Image.Image:
    """The base style: flat colours, each off its palette entry by at most 12 of 255; RGB, 64 x 64."""
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
    scale = max(SUPERSAMPLING, 2 * size_px // SIZE_PX)
    canvas = Image.new("RGB", _canvas_size(scale), PAPER)
    canvas.paste(
        INK, mask=stripes(45, period_px=10, width_px=2.5, shift_px=random.uniform(0, 10), scale=scale)
    )
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
        x_px, y_px = random.uniform(0, SIZE_PX, 2).tolist()
        mask = shape_mask(str(random.choice(SHAPES)), Placement(x_px, y_px, random.uniform(8, 24)))
        canvas.paste(_any_colour(random), mask=_outer(mask, random.uniform(1, 3)))
        canvas.paste(_any_colour(random), mask=mask)
    return _finish(canvas)


def shape_mask(shape: str, place: Placement, scale: int = SUPERSAMPLING) -> Image.Image:
    """Where the shape is: mode L, 255 inside, at ``scale`` times the picture's size."""
    mask = Image.new("L", _canvas_size(scale), 0)
    pen = ImageDraw.Draw(mask)
    x, y, r = (scale * value for value in (place.x_px, place.y_px, place.radius_px))
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    if shape == "ring":
        hole = 0.5 * r
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    if shape == "square":
        side = 0.85 * r
        pen.rectangle((x - side, y - side, x + side, y + side), fill=255)
    if shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=255)
    if shape == "star":
        corners = [(r if n % 2 == 0 else 0.42 * r, math.pi * n / 5) for n in range(10)]
        pen.polygon([(x + d * math.sin(a), y - d * math.cos(a)) for d, a in corners], fill=255)
    if shape == "cross":
        arm = 0.34 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
    return mask


def stripes(
    angle_degrees: float, period_px: float, width_px: float, shift_px: float, scale: int = SUPERSAMPLING
) -> Image.Image:
    """Parallel lines as a mask of mode L, at ``scale`` times the picture's size; the period is across the lines."""
    across = _ramp(angle_degrees, scale) + shift_px
    return _to_mask(across % period_px < width_px)


def _pattern(pattern: str, random: np.random.Generator) -> Image.Image:
    period_px = random.uniform(7, 12)
    first, second = random.uniform(0, period_px, 2)
    if pattern == "stripes":
        angle_degrees = random.choice([0, 45, 90, 135])
        return stripes(angle_degrees, period_px, period_px * random.uniform(0.2, 0.5), first)
    across, down = _ramp(0) + first, _ramp(90) + second
    if pattern == "checks":
        return _to_mask((across // period_px + down // period_px) % 2 < 1)
    dots = (across % period_px - period_px / 2) ** 2 + (down % period_px - period_px / 2) ** 2
    return _to_mask(dots < (0.28 * period_px) ** 2)


def _canvas_size(scale: int = SUPERSAMPLING) -> tuple[int, int]:
    return SIZE_PX * scale, SIZE_PX * scale


def _ramp(angle_degrees: float, scale: int = SUPERSAMPLING) -> np.ndarray:
    rows, columns = np.mgrid[0 : SIZE_PX * scale, 0 : SIZE_PX * scale] / scale
    angle = math.radians(angle_degrees)
    return rows * math.sin(angle) + columns * math.cos(angle)


def _to_mask(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * 255)


def _outer(mask: Image.Image, width_px: float, scale: int = SUPERSAMPLING) -> Image.Image:
    # A Gaussian falls to 2.3 % of a straight edge's height at two sigma.
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
