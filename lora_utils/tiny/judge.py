"""Judges pictures of the little world without any learned model: nearest colours, templates, line directions.

A picture is an RGB image of 64 x 64 pixels. Colours are read where the picture is flat, so that lines and
soft edges do not count.
"""

from functools import cache

import numpy as np
from PIL import Image

from lora_utils.tiny.world import COLOURS, INK, PAPER, SHAPES, SIZE_PX, SUPERSAMPLING, Placement, shape_mask

FLAT_STD = 20.0
"""Of 255, over 5 x 5 pixels: above it there is an edge."""
BORDER_PX = 6
"""Width of the frame that shows the background: the largest shape touches its innermost pixel only."""
DARK = 115.0
"""Mean of the channels, of 255: ink is below, paper far above."""
FEWEST_PIXELS = 12
"""Of a colour, for it to count."""
NAMES = (*COLOURS, "paper", "ink")
VALUES = np.array([*COLOURS.values(), PAPER, INK], dtype=np.float32)


def background_of(picture: Image.Image) -> str | None:
    """The palette colour that most of the border shows; None where nothing is flat."""
    return _most_common(_classes(picture)[_border() & _flat(picture)], exclude=())


def colour_of(picture: Image.Image) -> str | None:
    """The shape's palette colour on a plain background; None where there is no second colour."""
    background = background_of(picture)
    return _most_common(_classes(picture)[_flat(picture)], exclude=(background, "paper", "ink"))


def colour_of_ink(picture: Image.Image) -> str | None:
    """The shape's palette colour in the ink style; dark ink counts as black, paper as no colour."""
    classes = _classes(picture)[_flat(picture) & ~_border()]
    # Outlines and hatching are too thin to be flat: a flat dark area is a shape that should be black.
    classes = np.where(classes == NAMES.index("ink"), NAMES.index("black"), classes)
    return _most_common(classes, exclude=("paper",))


def shape_of(picture: Image.Image) -> str:
    """The shape whose template overlaps best (intersection over union) with what differs from the border."""
    pixels = _pixels(picture)
    ground = np.median(pixels[_border()], axis=0)

    # More than half of the way to the shape's colour, whatever the contrast: of 64 x 64 pixels every shape
    # covers more than 5 %, so the 95th percentile lies in it.
    figure = np.linalg.norm(pixels - ground, axis=-1)
    inside = (figure > 0.5 * np.quantile(figure, 0.95)).ravel().astype(np.float32)

    names, templates = _templates()
    overlap = templates @ inside
    return names[int(np.argmax(overlap / (templates.sum(axis=1) + inside.sum() - overlap)))]


def is_ink(picture: Image.Image) -> bool:
    """Whether paper, hatching and outline are all there."""
    return has_paper(picture) and has_hatching(picture) and has_outline(picture)


def has_paper(picture: Image.Image) -> bool:
    """Whether the brighter half of the border is cream."""
    border = _pixels(picture)[_border()]
    # The darker half may be hatching, which covers a quarter of the paper.
    brighter = border[border.mean(axis=1) >= np.median(border.mean(axis=1))]
    return bool(np.linalg.norm(np.median(brighter, axis=0) - PAPER) < 40)


def has_hatching(picture: Image.Image) -> bool:
    """Whether the border has dark lines that run from lower left to upper right, and not the other way."""
    light = _pixels(picture).mean(axis=2)
    dark = light[_border()] < np.median(light[_border()]) - 40
    # Shifted along its lines hatching lies on itself, shifted across them it does not; patterns of the base
    # style that run this way are possible, but not on paper.
    return bool(0.08 < dark.mean() < 0.6 and _repeats(light, 3, -3) - _repeats(light, 3, 3) > 0.4)


def has_outline(picture: Image.Image) -> bool:
    """Whether at least half of the shape's surroundings is dark; a black shape has its outline in itself."""
    name = colour_of_ink(picture)
    if name is None:
        return False
    if name == "black":
        return True

    # Along 48 rays from the middle of the shape: the last pixel of its colour, and what follows.
    core = (_classes(picture) == NAMES.index(name)) & ~_border()
    rows, columns = np.nonzero(core & _flat(picture))
    light = _pixels(picture).mean(axis=2)
    centre = (rows.mean(), columns.mean())
    angles = np.linspace(0, 2 * np.pi, 48)
    return bool(np.mean([_darkens_outwards(light, core, centre, angle) for angle in angles]) > 0.5)


def _darkens_outwards(light: np.ndarray, core: np.ndarray, centre: tuple[float, float], angle: float) -> bool:
    """Whether the picture is dark within 4 px outside of the core, in this direction (radians)."""
    reach = np.arange(0, SIZE_PX / 2, 0.5)
    rows = np.clip(centre[0] + reach * np.sin(angle), 0, SIZE_PX - 1).round().astype(int)
    columns = np.clip(centre[1] + reach * np.cos(angle), 0, SIZE_PX - 1).round().astype(int)
    on_core = np.nonzero(core[rows, columns])[0]
    if len(on_core) == 0:
        return False
    last = on_core[-1]  # and not the first pixel off the core: a ring has a hole
    beyond = light[rows, columns][last + 1 : last + 9]
    return len(beyond) > 0 and beyond.min() < DARK


def _repeats(light: np.ndarray, down: int, right: int) -> float:
    """Correlation of the border with the picture shifted by so many pixels, from -1 to 1."""
    shifted = np.roll(light, (-down, -right), axis=(0, 1))
    frame = _border(10) & ~_border(3)  # not the outermost 3 px, into which np.roll brings the other side
    if light[frame].std() <= 1:
        return 0.0  # all of one colour, where a correlation is noise, or undefined
    return float(np.corrcoef(light[frame], shifted[frame])[0, 1])


def _most_common(classes: np.ndarray, exclude: tuple[str | None, ...]) -> str | None:
    counts = np.bincount(classes, minlength=len(NAMES))
    for name in exclude:
        if name is not None:
            counts[NAMES.index(name)] = 0
    return NAMES[int(counts.argmax())] if counts.max() >= FEWEST_PIXELS else None


def _classes(picture: Image.Image) -> np.ndarray:
    """For each pixel the index in ``NAMES`` of the nearest colour; (64, 64)."""
    distances = np.linalg.norm(_pixels(picture)[:, :, None] - VALUES, axis=-1)
    return distances.argmin(axis=-1)


def _flat(picture: Image.Image) -> np.ndarray:
    """Where the 5 x 5 pixels around a pixel look alike in every channel; (64, 64)."""
    padded = np.pad(_pixels(picture), ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(0, 1))
    return windows.std(axis=(-2, -1)).max(axis=-1) < FLAT_STD


def _border(width_px: int = BORDER_PX) -> np.ndarray:
    inside = np.ones((SIZE_PX, SIZE_PX), bool)
    inside[width_px:-width_px, width_px:-width_px] = False
    return inside


def _pixels(picture: Image.Image) -> np.ndarray:
    if picture.size != (SIZE_PX, SIZE_PX):
        raise ValueError(f"pictures of this world are {SIZE_PX} px, not {picture.size}")
    return np.asarray(picture.convert("RGB"), dtype=np.float32)


@cache
def _templates() -> tuple[list[str], np.ndarray]:
    """Every shape in every size and at every place that the world knows, and a little beyond.

    Returns:
        Names of the shapes, and their masks as rows of 64 * 64 zeros and ones.
    """
    middle = SIZE_PX / 2
    names = []
    masks = []
    for shape in SHAPES:
        for radius_px in np.arange(14, 25, 2.0):
            for x_px in np.arange(middle - 6, middle + 7, 2.0):
                for y_px in np.arange(middle - 6, middle + 7, 2.0):
                    mask = shape_mask(shape, Placement(x_px, y_px, radius_px))
                    masks.append(np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32).ravel() / 255 > 0.5)
                    names.append(shape)
    return names, np.stack(masks).astype(np.float32)
