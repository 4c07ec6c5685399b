"""The little world that the tiny SDXL has learned: coloured shapes on backgrounds, 64 px on the short side.

Every picture is a function of a scene and a NumPy generator, so the order of its draws may not change: the
weights in this folder and the demo's figures belong to it. The base model knows ``draw_plain`` alone. What it
has never seen is for LoRAs to learn: two drawing styles, ink and blueprint, and one shape, the subject.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lora_utils.tiny.drawing import (
    SIDE_PX,
    SQUARE,
    SUPERSAMPLING,
    Placement,
    Size,
    canvas_size,
    random_pattern,
    random_placement,
    shape_mask,
    stripes,
    widened,
)

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
LANDSCAPE = Size(64, 96)
PORTRAIT = Size(96, 64)
SIZES = (SQUARE, LANDSCAPE, PORTRAIT)


@dataclass(frozen=True)
class Style:
    """A way of drawing that the base model does not know; no colour of it is one of the palette."""

    name: str
    paper: RGB
    line: RGB
    """Colour of the lines on the paper."""
    outline: RGB
    angles_degrees: tuple[float, ...]
    """Across the lines, one set of lines for each."""
    period_px: float
    width_px: float
    """Of a line."""
    outline_px: float
    outline_like: str
    """The colour of the palette whose shapes the outline cannot be told from."""


INK = Style("ink", (244, 230, 200), (60, 40, 34), (60, 40, 34), (45,), 10, 2.5, 3, "black")
"""Dark outlines on hatched cream paper."""
BLUEPRINT = Style("blueprint", (30, 66, 128), (104, 148, 204), (238, 244, 250), (0, 90), 8, 1.5, 2.5, "white")
"""White outlines on blue grid paper: finer lines, in two directions."""
STYLES = (INK, BLUEPRINT)


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


def plain_scenes(shapes: tuple[str, ...] = SHAPES) -> list[Scene]:
    """All scenes of one shape on a background of another colour, in a fixed order: 56 for each shape."""
    return [
        Scene(shape, colour, background)
        for shape in shapes
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


def draw_plain(scene: Scene, random: np.random.Generator, size: Size = SQUARE) -> Image.Image:
    """The base style: flat colours, each off its palette entry by at most 12 of 255; RGB."""
    # From back to front: ground, pattern, outline, shape.
    canvas = Image.new("RGB", canvas_size(size=size), _jitter(COLOURS[scene.background], random))
    if scene.pattern and scene.pattern_colour:
        pattern_colour = _jitter(COLOURS[scene.pattern_colour], random)
        canvas.paste(pattern_colour, mask=random_pattern(scene.pattern, random, size))
    mask = shape_mask(scene.shape, random_placement(random, size), size=size)
    if scene.outline:
        canvas.paste(_jitter(COLOURS[scene.outline], random), mask=widened(mask, random.uniform(1.5, 3)))
    canvas.paste(_jitter(COLOURS[scene.colour], random), mask=mask)
    return _finish(canvas, size)


def draw_styled(
    scene: Scene, style: Style, random: np.random.Generator, size_px: int = SIDE_PX
) -> Image.Image:
    """A flat shape with an outline on lined paper, whatever the background says.

    Drawn at any size, so that a full-size SDXL can learn it too; RGB, square.
    """
    # Large pictures too are averaged down, 2 to 1 at least.
    scale = max(SUPERSAMPLING, 2 * size_px // SIDE_PX)
    canvas = Image.new("RGB", canvas_size(scale), style.paper)
    for angle_degrees in style.angles_degrees:
        shift_px = random.uniform(0, style.period_px)
        lines = stripes(angle_degrees, style.period_px, style.width_px, shift_px, scale)
        canvas.paste(style.line, mask=lines)
    mask = shape_mask(scene.shape, random_placement(random), scale)
    canvas.paste(style.outline, mask=widened(mask, style.outline_px, scale))
    canvas.paste(COLOURS[scene.colour], mask=mask)
    return canvas.resize((size_px, size_px), Image.Resampling.BOX)


def draw_doodle(random: np.random.Generator) -> Image.Image:
    """Any colours, lines at any angle, any shapes: what an autoencoder should be able to keep."""
    canvas = Image.new("RGB", canvas_size(), _any_colour(random))
    period_px = random.uniform(5, 16)
    angle_degrees = random.choice([0, 45, 90, 135, random.uniform(0, 180)])
    lines = stripes(
        angle_degrees, period_px, random.uniform(1.2, period_px / 2), random.uniform(0, period_px)
    )
    canvas.paste(_any_colour(random), mask=lines)
    for _ in range(random.integers(1, 4)):
        # Anywhere, over the edge and over each other too.
        x_px, y_px = random.uniform(0, SIDE_PX, 2).tolist()
        mask = shape_mask(str(random.choice(SHAPES)), Placement(x_px, y_px, random.uniform(8, 24)))
        canvas.paste(_any_colour(random), mask=widened(mask, random.uniform(1, 3)))
        canvas.paste(_any_colour(random), mask=mask)
    return _finish(canvas, SQUARE)


def _jitter(colour: RGB, random: np.random.Generator) -> RGB:
    red, green, blue = np.clip(np.array(colour) + random.integers(-12, 13, 3), 0, 255).tolist()
    return red, green, blue


def _any_colour(random: np.random.Generator) -> RGB:
    red, green, blue = random.integers(0, 256, 3).tolist()
    return red, green, blue


def _finish(canvas: Image.Image, size: Size) -> Image.Image:
    return canvas.resize((size.width_px, size.height_px), Image.Resampling.BOX)
