"""How an image becomes a training example: its shape, its crops, and the six numbers SDXL is told about them.

Sizes are (width, height) in pixels, as PIL has them; time_ids are (height, width), as SDXL has them. Buckets follow
NovelAI's aspect-ratio bucketing (2022) under the names of sd-scripts' settings.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from lora_utils.config.data import DataConfig
from lora_utils.config.section import Size
from lora_utils.data.images import ImageError

GREATEST_ENLARGEMENT = 8


@dataclass(frozen=True)
class Crop:
    """A mirroring, a resize and a crop, in this order."""

    original: Size
    resized: Size
    left: int
    top: int
    size: Size
    flip: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Original height and width, crop top and left, target height and width (Podell et al., 2023, section 2.2)."""
        width, height = self.original
        return height, width, self.top, self.left, self.size[1], self.size[0]

    def apply(self, image: Image.Image) -> np.ndarray:
        """The cropped image, (height, width, 3), uint8."""
        return np.asarray(self._cut(image, self.size, Image.Resampling.LANCZOS))

    def apply_to_mask(self, mask: Image.Image, scale_factor: int) -> np.ndarray:
        """The mean of the mask over each latent, (height / scale_factor, width / scale_factor), uint8."""
        return np.asarray(self._cut(mask, _shrunk(self.size, scale_factor), Image.Resampling.BOX))

    def _cut(self, image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
        # Resizing only the part that is kept: a long strip would become gigapixels otherwise.
        across, down = image.width / self.resized[0], image.height / self.resized[1]
        right, bottom = (self.left + self.size[0]) * across, (self.top + self.size[1]) * down
        box = (self.left * across, self.top * down, min(right, image.width), min(bottom, image.height))
        return (ImageOps.mirror(image) if self.flip else image).resize(size, resample, box)


def bucket_sizes(resolution: Size, shortest: int, longest: int, step: int) -> list[Size]:
    """Every shape on the grid of ``step`` with about the area of ``resolution``, both ways round, sorted."""
    area = resolution[0] * resolution[1]
    sizes = {(max(step, resolution[0] // step * step), max(step, resolution[1] // step * step))}
    for width in range(math.ceil(shortest / step) * step, longest + 1, step):
        height = min(longest, area // width) // step * step
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def choose_size(original: Size, config: DataConfig) -> Size:
    """The shape that an image is trained in.

    Raises:
        ImageError: It is far too small or too narrow for any.
    """
    if not config.enable_bucket:
        size = config.resolution
    elif config.bucket_no_upscale:
        size = _own_bucket(original, config)
    else:
        sizes = bucket_sizes(
            config.resolution, config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps
        )
        size = min(sizes, key=lambda one: (_distortion(original, one), -one[0] * one[1]))
    if enlargement(original, size) > GREATEST_ENLARGEMENT:
        sizes = f"{original[0]}x{original[1]} for {size[0]}x{size[1]}"
        raise ImageError(f"far too small ({sizes})", "use a larger picture, or lower resolution")
    return size


def enlargement(original: Size, size: Size) -> float:
    """The factor by which an image is resized to cover a shape."""
    return max(size[0] / original[0], size[1] / original[1])


def cropped_share(original: Size, size: Size) -> float:
    """The share of an image that does not fit into a shape, in [0, 1)."""
    scale = enlargement(original, size)
    return 1 - size[0] * size[1] / (original[0] * original[1] * scale * scale)


def plan_crops(original: Size, size: Size, content_hash: str, config: DataConfig) -> list[Crop]:
    """The variants of an image that are encoded, the first one being what the held-out loss sees.

    Random crops depend on the image's bytes alone, not on the run's seed, so another seed finds them in the cache.
    """
    scale = enlargement(original, size)
    resized = max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))
    room = resized[0] - size[0], resized[1] - size[1]
    corners = [(room[0] // 2, room[1] // 2)]
    if config.random_crop:
        draws = np.random.default_rng(int(content_hash[:16], 16)).random((config.crop_variants, 2))
        corners = [(int(x * (room[0] + 1)), int(y * (room[1] + 1))) for x, y in draws]
    flips = (False, True) if config.random_flip else (False,)
    return [
        Crop(original, resized, room[0] - left if flip else left, top, size, flip)
        for left, top in dict.fromkeys(corners)
        for flip in flips
    ]


def _distortion(original: Size, size: Size) -> float:
    return abs(math.log(size[0] * original[1] / (size[1] * original[0])))


def _own_bucket(original: Size, config: DataConfig) -> Size:
    width, height = original
    step, area = config.bucket_reso_steps, config.resolution[0] * config.resolution[1]
    scale = min(1.0, math.sqrt(area / (width * height)))
    size = tuple(min(config.max_bucket_reso, int(side * scale)) // step * step for side in original)
    if min(size) == 0:
        raise ImageError(
            f"too narrow ({width}x{height} for bucket_reso_steps {step})", "lower bucket_reso_steps"
        )
    return size[0], size[1]


def _shrunk(size: Size, factor: int) -> Size:
    return size[0] // factor, size[1] // factor
