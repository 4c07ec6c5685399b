"""Pictures that carry the settings that they were drawn with."""

import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_utils.compare.sampling import SamplingSettings, Shot
from lora_utils.system.files import write_atomically


def save_image(
    image: Image.Image, path: Path, shot: Shot, settings: SamplingSettings, adapter_scale: float
) -> None:
    """Write a PNG that carries its settings: JSON under ``lora_utils``, one line under ``parameters``.

    The second is the line that stable-diffusion-webui and its relatives read back.
    """
    facts = asdict(shot) | asdict(settings) | {"adapter_scale": adapter_scale}
    info = PngInfo()
    # iTXt, because prompts need not be Latin-1; image viewers read both kinds.
    info.add_itxt("lora_utils", json.dumps(facts, ensure_ascii=False))
    info.add_itxt(
        "parameters",
        f"{shot.prompt}\nNegative prompt: {settings.negative_prompt or ''}\n"
        f"Steps: {settings.num_inference_steps}, CFG scale: {settings.guidance_scale}, "
        f"Seed: {shot.seed}, Size: {image.width}x{image.height}, LoRA scale: {adapter_scale}",
    )
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())
