"""Pictures that carry the settings that they were drawn with."""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from lora_utils.system.files import write_atomically

FACTS = "lora_utils"
"""Name of the text in a PNG that holds its settings as JSON, and so says that it was drawn here."""


def save_image(image: Image.Image, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a PNG that carries its settings: JSON under ``lora_utils``, one line under ``parameters``.

    The second is the line that stable-diffusion-webui and its relatives read back.

    Args:
        image: What was drawn.
        path: Where to; replaced whole, or not at all.
        facts: Of Shot and SamplingSettings all fields, and adapter_scale.
    """
    info = PngInfo()
    # iTXt, because prompts need not be Latin-1; image viewers read both kinds.
    info.add_itxt(FACTS, json.dumps(facts, ensure_ascii=False))
    info.add_itxt(
        "parameters",
        f"{facts['prompt']}\nNegative prompt: {facts['negative_prompt'] or ''}\n"
        f"Steps: {facts['num_inference_steps']}, CFG scale: {facts['guidance_scale']}, "
        f"Seed: {facts['seed']}, Size: {image.width}x{image.height}, LoRA scale: {facts['adapter_scale']}",
    )
    _save(image, path, info)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a PNG that says no more than that it was drawn here."""
    info = PngInfo()
    info.add_itxt(FACTS, "{}")
    _save(sheet, path, info)


def was_drawn_here(path: Path) -> bool:
    """Whether a file is a picture or a sheet of ours, as it was written."""
    try:
        with Image.open(path) as image:
            return FACTS in image.info
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # damaged, or no picture at all


def _save(image: Image.Image, path: Path, info: PngInfo) -> None:
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())
