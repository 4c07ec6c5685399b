"""Masks that the little world's pictures are painted through: shapes, lines, patterns, outlines.

Drawn larger and averaged down, so edges are smooth; lengths are in pixels of the finished picture, whose
short side has ``SIDE_PX``. A mask is an image of mode L, 255 inside, at ``scale`` times the picture's size.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE_PX = 64
SUPERSAMPLING = 4
"""Pixels that are drawn, along each side, for one of the picture."""


class Size(NamedTuple):
    """Of a picture, in pixels; height first, as in SDXL's time ids."""

    height_px: int
    width_px: int

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.height_px * self.width_px


SQUARE = Size(SIDE_PX, SIDE_PX)
SUBJECT = "momo"
"""A round head with two ears and two eyes: the one shape that the base model has never seen, nor its word."""


@dataclass(frozen=True)
class Placement:
    """Where a shape sits, in pixels of the finished picture."""

    x_px: float
    y_px: float
    radius_px: float


def random_placement(random: np.random.Generator, size: Size = SQUARE) -> Placement:
    """Near the middle, of a radius that leaves some background on every side."""
    middle = np.array([size.width_px / 2, size.height_px / 2])
    x_px, y_px = random.uniform(middle - 5, middle + 5).tolist()
    return Placement(x_px, y_px, random.uniform(16, 22))


def shape_mask(
    shape: str, placement: Placement, scale: int = SUPERSAMPLING, size: Size = SQUARE
) -> Image.Image:
    """Where the shape is."""
    mask = Image.new("L", canvas_size(scale, size), 0)
    pen = ImageDraw.Draw(mask)
    x = scale * placement.x_px
    y = scale * placement.y_px
    r = scale * placement.radius_px
    if shape in ("circle", "ring"):
        _disc(pen, x, y, r)
    if shape == "ring":
        _disc(pen, x, y, 0.5 * r, fill=0)
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
    if shape == SUBJECT:
        _disc(pen, x, y + 0.22 * r, 0.78 * r)
        for side in (-1, 1):
            _disc(pen, x + side * 0.62 * r, y - 0.62 * r, 0.38 * r)
            _disc(pen, x + side * 0.3 * r, y + 0.1 * r, 0.17 * r, fill=0)
    return mask


def stripes(
    angle_degrees: float,
    period_px: float,
    width_px: float,
    shift_px: float,
    scale: int = SUPERSAMPLING,
    size: Size = SQUARE,
) -> Image.Image:
    """Parallel lines.

    Args:
        angle_degrees: Of the direction across the lines, clockwise from the right: 0 draws upright lines.
        period_px: From line to line, across them.
        width_px: Of a line.
        shift_px: Of all lines, across them.
        scale: Pixels that are drawn for one of the picture.
        size: Of the picture.
    """
    across = _ramp(angle_degrees, scale, size) + shift_px
    return _to_mask(across % period_px < width_px)


def random_pattern(pattern: str, random: np.random.Generator, size: Size = SQUARE) -> Image.Image:
    """Stripes, dots or checks of a random period, stripes also of a random direction."""
    period_px = random.uniform(7, 12)
    first_px, second_px = random.uniform(0, period_px, 2)  # where it begins, so that no two look alike
    if pattern == "stripes":
        angle_degrees = random.choice([0, 45, 90, 135])
        width_px = period_px * random.uniform(0.2, 0.5)
        return stripes(angle_degrees, period_px, width_px, first_px, size=size)

    across = _ramp(0, SUPERSAMPLING, size) + first_px
    down = _ramp(90, SUPERSAMPLING, size) + second_px
    if pattern == "checks":
        return _to_mask((across // period_px + down // period_px) % 2 < 1)
    dots = (across % period_px - period_px / 2) ** 2 + (down % period_px - period_px / 2) ** 2
    return _to_mask(dots < (0.28 * period_px) ** 2)  # a squared distance from the middle of its square


def widened(mask: Image.Image, width_px: float, scale: int = SUPERSAMPLING) -> Image.Image:
    """The mask, wider by so much all around."""
    # Sigma is half of the width: two sigma outside of it, a straight edge is blurred to 2.3 % of its height.
    blurred = mask.filter(ImageFilter.GaussianBlur(width_px * scale / 2))
    return _to_mask(np.asarray(blurred) > 0.023 * 255)


def canvas_size(scale: int = SUPERSAMPLING, size: Size = SQUARE) -> tuple[int, int]:
    """Width and height in drawn pixels, as PIL wants them."""
    return size.width_px * scale, size.height_px * scale


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int = 255) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _ramp(angle_degrees: float, scale: int, size: Size) -> np.ndarray:
    """How far along a direction each drawn pixel lies, in pixels of the picture."""
    width, height = canvas_size(scale, size)
    rows, columns = np.mgrid[0:height, 0:width] / scale
    angle = math.radians(angle_degrees)
    return rows * math.sin(angle) + columns * math.cos(angle)


def _to_mask(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * 255)
