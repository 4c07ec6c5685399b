"""Base model and LoRA on equal seeds, as files: two PNGs for each shot, and one sheet of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_utils.compare.png import save_image
from lora_utils.compare.sampling import SamplingSettings, Shot
from lora_utils.compare.sheet import contact_sheet
from lora_utils.system.files import commit_file


@dataclass(frozen=True)
class Comparison:
    """What was drawn, in the order of the shots."""

    folder: Path
    shots: list[Shot]
    baseline: list[Image.Image]
    finetuned: list[Image.Image]
    sheet: Image.Image


def write(
    folder: Path,
    shots: Sequence[Shot],
    settings: SamplingSettings,
    baseline: Sequence[Image.Image],
    finetuned: Sequence[Image.Image],
    adapter_scale: float,
) -> Comparison:
    """Write baseline_*.png, finetuned_*.png and sheet.png.

    Args:
        folder: Where to; made where it is missing.
        shots: What was drawn.
        settings: How it was drawn.
        baseline: By the base model, one image for each shot.
        finetuned: With the LoRA, likewise.
        adapter_scale: Strength of the LoRA.
    """
    for name, images, scale in (("baseline", baseline, 0.0), ("finetuned", finetuned, adapter_scale)):
        for index, (shot, image) in enumerate(zip(shots, images, strict=True)):
            path = folder / f"{name}_{index:03d}_seed{shot.seed}.png"
            save_image(image, path, shot, settings, scale)

    # Base above, LoRA below: what changed is seen by moving the eyes once.
    rows = {"base": list(baseline), f"LoRA × {adapter_scale:g}": list(finetuned)}
    sheet = contact_sheet(shots, rows)
    commit_file(folder / "sheet.png", lambda file: sheet.save(file, "PNG"))
    return Comparison(folder, list(shots), list(baseline), list(finetuned), sheet)
