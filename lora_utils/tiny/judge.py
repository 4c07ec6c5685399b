"""Judges pictures of the little world without any learned model: nearest colours, templates, directions.

A picture is an RGB image of one of the world's sizes. Colours are read where the picture is flat, so that
lines and soft edges do not count.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from lora_utils.tiny.drawing import SUBJECT, SUPERSAMPLING, Placement, Size, shape_mask
from lora_utils.tiny.world import COLOURS, INK, SHAPES, SIZES, STYLES, Style

FLAT_STD = 20.0
"""Of 255, over 5 x 5 pixels: above it there is an edge."""
BORDER_PX = 6
"""Width of the frame that shows the background: the largest shape touches its innermost pixel only."""
PAPER_DISTANCE = 40.0
"""Of 255, in RGB: nearer to the paper's colour than this is paper."""
OUTLINE_STEP = 0.5
"""Of the way from the shape's brightness to the outline's, at least so much darkens or brightens."""
FEWEST_PIXELS = 12
"""Of a colour, for it to count."""
SMALLEST_SHARE = 0.02
"""Of a picture that a shape covers."""
NAMES = (*COLOURS, *(f"{style.name} {part}" for style in STYLES for part in ("paper", "line")))
VALUES = np.array(
    [*COLOURS.values(), *(colour for style in STYLES for colour in (style.paper, style.line))], np.float32
)


def background_of(picture: Image.Image) -> str | None:
    """The palette colour that most of the border shows; None where nothing is flat."""
    return _most_common(_classes(picture)[_border(picture) & _flat(picture)], exclude=())


def colour_of(picture: Image.Image) -> str | None:
    """The shape's palette colour on a plain background; None where there is no second colour."""
    background = background_of(picture)
    return _most_common(_classes(picture)[_flat(picture)], exclude=(background, *NAMES[len(COLOURS) :]))


def shape_of(picture: Image.Image, shapes: tuple[str, ...] = (*SHAPES, SUBJECT)) -> str:
    """The shape whose template overlaps best (intersection over union) with what differs from the border."""
    return _best_shape(_figure(picture), shapes)


def count_shapes(picture: Image.Image) -> int:
    """Connected figures on a plain background, apart from specks."""
    figure = _figure(picture)
    smallest = SMALLEST_SHARE * figure.size
    return sum(len(part) >= smallest for part in _connected(figure))


def colour_in_style(picture: Image.Image, style: Style) -> str | None:
    """The shape's palette colour on lined paper; the outline's colour counts as the one that is like it."""
    classes = _styled_classes(picture, style)[_flat(picture) & ~_border(picture)]
    # Outlines and lines are too thin to be flat: a flat area of their colour is a shape of that colour.
    return _most_common(classes, exclude=NAMES[len(COLOURS) :])


def shape_in_style(picture: Image.Image, style: Style) -> str:
    """The shape whose template overlaps best with the figure on lined paper: its colour, thick enough."""
    name = colour_in_style(picture, style)
    if name is None:
        return "none"
    return _best_shape(_core(picture, style, name), (*SHAPES, SUBJECT))


def in_style(picture: Image.Image, style: Style) -> bool:
    """Whether paper, lines and outline are all there."""
    return has_paper(picture, style) and has_lines(picture, style) and has_outline(picture, style)


def has_paper(picture: Image.Image, style: Style) -> bool:
    """Whether that half of the border which is not lines has the paper's colour."""
    border = _pixels(picture)[_border(picture)]
    light = border.mean(axis=1)
    is_paper = light >= np.median(light) if _lines_are_dark(style) else light <= np.median(light)
    return bool(np.linalg.norm(np.median(border[is_paper], axis=0) - style.paper) < PAPER_DISTANCE)


def has_lines(picture: Image.Image, style: Style) -> bool:
    """Whether the border repeats along the style's lines, and not otherwise."""
    light = _pixels(picture).mean(axis=2)
    if style != INK:
        return _has_grid(light, style.period_px)
    dark = light[_border(picture)] < np.median(light[_border(picture)]) - 40
    # Shifted along its lines hatching lies on itself, shifted across them it does not; patterns of the base
    # style that run this way are possible, but not on paper.
    return bool(0.08 < dark.mean() < 0.6 and _repeats(light, 3, -3) - _repeats(light, 3, 3) > 0.4)


def has_outline(picture: Image.Image, style: Style) -> bool:
    """Whether at least half of the shape's surroundings has the outline's brightness.

    A shape of the outline's own colour has its outline in itself.
    """
    name = colour_in_style(picture, style)
    if name is None:
        return False
    if name == style.outline_like:
        return True

    # Along 48 rays from the middle of the shape: the last pixel of its colour, and what follows.
    core = _core(picture, style, name)
    rows, columns = np.nonzero(core & _flat(picture))
    light = _pixels(picture).mean(axis=2)
    own = float(np.mean(COLOURS[name]))
    wanted = float(np.mean(style.outline))
    # Towards dark or towards bright: as a share of the way, so that one rule serves both.
    change = (light - own) / (wanted - own)
    centre = (rows.mean(), columns.mean())
    angles = np.linspace(0, 2 * np.pi, 48)
    return bool(np.mean([_is_outlined(change, core, centre, angle) for angle in angles]) > 0.5)


def _is_outlined(change: np.ndarray, core: np.ndarray, centre: tuple[float, float], angle: float) -> bool:
    """Whether the outline's brightness is reached within 4 px outside of the core, in this direction."""
    height, width = change.shape
    reach = np.arange(0, min(height, width) / 2, 0.5)
    rows = np.clip(centre[0] + reach * np.sin(angle), 0, height - 1).round().astype(int)
    columns = np.clip(centre[1] + reach * np.cos(angle), 0, width - 1).round().astype(int)
    on_core = np.nonzero(core[rows, columns])[0]
    if len(on_core) == 0:
        return False
    last = on_core[-1]  # and not the first pixel off the core: a ring has a hole
    beyond = change[rows, columns][last + 1 : last + 9]
    return len(beyond) > 0 and beyond.max() > OUTLINE_STEP


def _has_grid(light: np.ndarray, period_px: float) -> bool:
    """Whether both pairs of opposite edges show upright lines of this period."""
    for edges in (light, light.T):
        # Averaged along the border's depth: lines that run along an edge become one brightness for all of it.
        profile = np.concatenate([edges[:BORDER_PX], edges[-BORDER_PX:]]).mean(axis=0)
        powers = np.abs(np.fft.rfft(profile - profile.mean())) ** 2
        rate = round(len(profile) / period_px)
        # Thin lines have as much in the multiples of their rate as in the rate itself.
        if profile.std() < 4 or powers[rate::rate].sum() < 0.5 * powers.sum():
            return False
    return True


def _lines_are_dark(style: Style) -> bool:
    return sum(style.line) < sum(style.paper)


def _core(picture: Image.Image, style: Style, name: str) -> np.ndarray:
    """The shape on lined paper: its colour, where it is thick, as lines that are like it are not."""
    colour = (_styled_classes(picture, style) == NAMES.index(name)) & ~_border(picture)
    return _grown(colour & _flat(picture)) & colour


def _styled_classes(picture: Image.Image, style: Style) -> np.ndarray:
    """Nearest colours of the palette and the style, lines like the outline as the palette's like that."""
    others = [number for number, name in enumerate(NAMES) if _is_of_another(name, style)]
    classes = _classes(picture, others)
    if style.line == style.outline:
        like = NAMES.index(style.outline_like)
        classes = np.where(classes == NAMES.index(f"{style.name} line"), like, classes)
    return classes


def _figure(picture: Image.Image) -> np.ndarray:
    """What differs from a plain border; bool, (H, W)."""
    pixels = _pixels(picture)
    ground = np.median(pixels[_border(picture)], axis=0)
    # More than half of the way to the shape's colour, whatever the contrast: every shape covers more than 5 %
    # of a picture, so the 95th percentile lies in it.
    distance = np.linalg.norm(pixels - ground, axis=-1)
    return distance > 0.5 * np.quantile(distance, 0.95)


def _best_shape(figure: np.ndarray, shapes: tuple[str, ...]) -> str:
    inside = figure.ravel().astype(np.float32)
    names, templates = _templates(Size(*figure.shape))
    overlap = templates @ inside
    ratios = overlap / (templates.sum(axis=1) + inside.sum() - overlap)
    return names[int(np.argmax(np.where(np.isin(names, shapes), ratios, -1)))]


def _connected(figure: np.ndarray) -> list[list[tuple[int, int]]]:
    """Its parts, each a list of pixels that touch along a side."""
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(figure), strict=True)}
    parts = []
    while left:
        part = [left.pop()]
        for row, column in part:  # grows while it is walked along
            beside = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)} & left
            left -= beside
            part += beside
        parts.append(part)
    return parts


def _grown(mask: np.ndarray) -> np.ndarray:
    """With everything that lies within the 5 x 5 pixels around one of its own."""
    padded = np.pad(mask, 2)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).any(axis=(-2, -1)))


def _repeats(light: np.ndarray, down: int, right: int) -> float:
    """Correlation of the border with the picture shifted by so many pixels, from -1 to 1."""
    shifted = np.roll(light, (-down, -right), axis=(0, 1))
    frame = _frame(light.shape, 10) & ~_frame(light.shape, 3)  # not where np.roll brings the other side
    if light[frame].std() <= 1:
        return 0.0  # all of one colour, where a correlation is noise, or undefined
    return float(np.corrcoef(light[frame], shifted[frame])[0, 1])


def _most_common(classes: np.ndarray, exclude: tuple[str | None, ...]) -> str | None:
    counts = np.bincount(classes, minlength=len(NAMES))
    for name in exclude:
        if name is not None:
            counts[NAMES.index(name)] = 0
    return NAMES[int(counts.argmax())] if counts.max() >= FEWEST_PIXELS else None


def _is_of_another(name: str, style: Style) -> bool:
    return name not in COLOURS and not name.startswith(f"{style.name} ")


def _classes(picture: Image.Image, without: Sequence[int] = ()) -> np.ndarray:
    """For each pixel the index in ``NAMES`` of the nearest colour; (H, W)."""
    distances = np.linalg.norm(_pixels(picture)[:, :, None] - VALUES, axis=-1)
    distances[:, :, list(without)] = np.inf
    return distances.argmin(axis=-1)


def _flat(picture: Image.Image) -> np.ndarray:
    """Where the 5 x 5 pixels around a pixel look alike in every channel; (H, W)."""
    padded = np.pad(_pixels(picture), ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(0, 1))
    return windows.std(axis=(-2, -1)).max(axis=-1) < FLAT_STD


def _border(picture: Image.Image) -> np.ndarray:
    return _frame((picture.height, picture.width), BORDER_PX)


def _frame(shape: tuple[int, ...], width_px: int) -> np.ndarray:
    inside = np.ones(shape, bool)
    inside[width_px:-width_px, width_px:-width_px] = False
    return inside


def _pixels(picture: Image.Image) -> np.ndarray:
    if (picture.height, picture.width) not in SIZES:
        sizes = ", ".join(f"{size.width_px} x {size.height_px}" for size in SIZES)
        raise ValueError(
            f"pictures of this world have {sizes} pixels, not {picture.width} x {picture.height}"
        )
    return np.asarray(picture.convert("RGB"), dtype=np.float32)


@cache
def _templates(size: Size) -> tuple[list[str], np.ndarray]:
    """Every shape in every radius and at every place that the world knows, and a little beyond.

    Returns:
        Names of the shapes, and their masks as rows of H * W zeros and ones.
    """
    names = []
    masks = []
    for shape in (*SHAPES, SUBJECT):
        for radius_px in np.arange(14, 25, 2.0):
            for right_px in np.arange(-6, 7, 2.0):
                for down_px in np.arange(-6, 7, 2.0):
                    placement = Placement(
                        size.width_px / 2 + right_px, size.height_px / 2 + down_px, radius_px
                    )
                    mask = shape_mask(shape, placement, size=size).reduce(SUPERSAMPLING)
                    masks.append(np.asarray(mask, dtype=np.float32).ravel() / 255 > 0.5)
                    names.append(shape)
    return names, np.stack(masks).astype(np.float32)
