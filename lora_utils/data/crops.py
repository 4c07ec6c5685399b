"""How an image becomes a training example: its shape, its crops, and the six numbers SDXL is told about them.

Sizes are (width, height) in pixels, as PIL has them; time_ids are (height, width), as SDXL has them. Buckets
follow NovelAI's aspect-ratio bucketing (2022) under the names of sd-scripts' settings.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from lora_utils.config.data import DataConfig
from lora_utils.config.section import Size
from lora_utils.data.images import ImageError

GREATEST_ENLARGEMENT = 8  # beyond that an image is one soft blur, which the LoRA would learn as its style


@dataclass(frozen=True)
class Crop:
    """A mirroring, a resize and a crop, in this order."""

    original: Size
    resized: Size
    left: int
    """Pixels of the resized, mirrored image that lie to the left of the crop."""
    top: int
    size: Size
    flip: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Height and width of original, top and left of crop, height and width of target.

        Micro-conditioning of Podell et al. (2023, section 2.2): what is told here, the U-Net need not hold
        for a trait of the pictures, such as blur of small ones or heads that are cut off.
        """
        width, height = self.original
        return height, width, self.top, self.left, self.size[1], self.size[0]

    def apply(self, image: Image.Image) -> np.ndarray:
        """The cropped image, (height, width, 3), uint8."""
        return np.asarray(self._cut(image, self.size, Image.Resampling.LANCZOS))

    def apply_to_mask(self, mask: Image.Image, scale_factor: int) -> np.ndarray:
        """The mean of the mask over each latent, (height / scale_factor, width / scale_factor), uint8."""
        size = (self.size[0] // scale_factor, self.size[1] // scale_factor)
        # A box filter is the plain mean. Lanczos would ring, and weigh latents beyond the mask's edge.
        return np.asarray(self._cut(mask, size, Image.Resampling.BOX))

    def _cut(self, image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
        # Resizing only the part that is kept: a long strip would become gigapixels otherwise.
        across = image.width / self.resized[0]
        down = image.height / self.resized[1]
        right = (self.left + self.size[0]) * across
        bottom = (self.top + self.size[1]) * down
        # Rounding may put the far edge a fraction of a pixel outside, which PIL refuses.
        box = (self.left * across, self.top * down, min(right, image.width), min(bottom, image.height))
        upright = ImageOps.mirror(image) if self.flip else image
        return upright.resize(size, resample, box)


def bucket_sizes(resolution: Size, shortest: int, longest: int, step: int) -> list[Size]:
    """Every shape on the grid of ``step`` with about the area of ``resolution``, both ways round, sorted."""
    area = resolution[0] * resolution[1]
    # The resolution itself always is a bucket, even where the loop below would round past it.
    sizes = {(max(step, resolution[0] // step * step), max(step, resolution[1] // step * step))}
    for width in range(math.ceil(shortest / step) * step, longest + 1, step):
        # Rounded down, so that no bucket needs more memory than the resolution does.
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
        # Of buckets with equal distortion the largest: more pixels of the image survive.
        size = min(sizes, key=lambda bucket: (_distortion(original, bucket), -bucket[0] * bucket[1]))

    if enlargement(original, size) > GREATEST_ENLARGEMENT:
        shapes = f"{original[0]}x{original[1]} for {size[0]}x{size[1]}"
        raise ImageError(f"far too small ({shapes})", "use a larger picture, or lower resolution")
    return size


def _distortion(original: Size, size: Size) -> float:
    # The logarithm makes twice as wide and half as wide equally far from the original.
    return abs(math.log(size[0] * original[1] / (size[1] * original[0])))


def _own_bucket(original: Size, config: DataConfig) -> Size:
    """The image's own shape on the grid of buckets, for who wants no image enlarged."""
    width, height = original
    step = config.bucket_reso_steps
    area = config.resolution[0] * config.resolution[1]
    scale = min(1.0, math.sqrt(area / (width * height)))

    size = tuple(min(config.max_bucket_reso, int(side * scale)) // step * step for side in original)
    if min(size) == 0:
        raise ImageError(
            f"too narrow ({width}x{height} for bucket_reso_steps {step})", "lower bucket_reso_steps"
        )
    return size[0], size[1]


def enlargement(original: Size, size: Size) -> float:
    """The factor by which an image is resized to cover a shape: the larger of both, so none falls short."""
    return max(size[0] / original[0], size[1] / original[1])


def cropped_share(original: Size, size: Size) -> float:
    """The share of an image that does not fit into a shape, in [0, 1)."""
    scale = enlargement(original, size)
    return 1 - size[0] * size[1] / (original[0] * original[1] * scale * scale)


def plan_crops(original: Size, size: Size, content_hash: str, config: DataConfig) -> list[Crop]:
    """The variants of an image that are encoded, the first one being what the held-out loss sees.

    Random crops depend on the image's bytes alone, not on the run's seed, so another seed finds them in the
    cache.

    Args:
        original: Of the image, upright.
        size: From ``choose_size``.
        content_hash: SHA-256 of the image file, 64 hexadecimal digits.
        config: Whether crops are random and mirrored, and how many there are to be.
    """
    scale = enlargement(original, size)
    # Rounding may end one pixel short of the shape that must be covered.
    width = max(size[0], round(original[0] * scale))
    height = max(size[1], round(original[1] * scale))
    spare_width = width - size[0]
    spare_height = height - size[1]

    corners = [(spare_width // 2, spare_height // 2)]
    if config.random_crop:
        # 64 bits of the hash are a seed that no two images share.
        draws = np.random.default_rng(int(content_hash[:16], 16)).random((config.crop_variants, 2))
        corners = [(int(x * (spare_width + 1)), int(y * (spare_height + 1))) for x, y in draws]

    crops = []
    for left, top in dict.fromkeys(corners):  # equal draws would be encoded and stored twice
        crops.append(Crop(original, (width, height), left, top, size, flip=False))
        if config.random_flip:
            # Counted from the mirrored image's left, so that both show the same part.
            crops.append(Crop(original, (width, height), spare_width - left, top, size, flip=True))
    return crops
