"""Image files: find them, open them, frame them for SDXL."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lora_utils import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class ImageError(UserError):
    """An image file cannot be used."""


@dataclass(frozen=True)
class Framed:
    """Pixels, and the sizes SDXL is told about them (Podell et al., 2023, section 2.2)."""

    pixels: Tensor
    """(3, H, W), fp32, in [-1, 1]."""
    time_ids: Tensor
    """(6,), fp32: original height, width; crop top, left; target height, width; in pixels."""


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder, not of its sub-folders, sorted by name.

    Raises:
        ImageError: The folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise ImageError(f"there is no folder {folder}; set train_data_dir to the folder that holds your images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ImageError(f"no image in {folder}; put {', '.join(sorted(SUFFIXES))} files there")
    return paths


def open_image(path: Path) -> Image.Image:
    """The whole image in RGB, turned as its EXIF orientation says.

    Raises:
        ImageError: The file is damaged or not an image.
    """
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def frame(image: Image.Image, resolution_px: int) -> Framed:
    """Resize the shorter side to the resolution and crop the centre square."""
    scale = resolution_px / min(image.size)
    width, height = (max(resolution_px, round(side * scale)) for side in image.size)
    left, top = (width - resolution_px) // 2, (height - resolution_px) // 2
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    crop = resized.crop((left, top, left + resolution_px, top + resolution_px))
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 127.5 - 1
    sizes = (image.height, image.width, top, left, resolution_px, resolution_px)
    return Framed(pixels, torch.tensor(sizes, dtype=torch.float32))
