"""How well the tiny SDXL, or a LoRA on it, draws: ``python -m lora_utils.tiny.evaluate [--lora_path DIR]``.

Without a LoRA, 200 prompts of the base model's world are judged. With one, 50 prompts that are not in the
demo data set, drawn by the base model and by the LoRA on equal seeds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from diffusers.utils import make_image_grid
from PIL import Image
from transformers.utils import logging as transformers_logging

from lora_utils.tiny import judge
from lora_utils.tiny.demo_data import unseen_scenes
from lora_utils.tiny.world import Scene, plain_scenes

FOLDER = Path(__file__).parent
BATCH = 25
"""Pictures that are drawn together, and that stand in a row of ``--picture``."""
STEPS = 20
"""Of the sampler."""
BASE_GUIDANCE = 4.0
LORA_GUIDANCE = 3.0


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained_model_name_or_path", type=Path, default=FOLDER)
    parser.add_argument("--lora_path", type=Path, help="folder or file of the LoRA to judge")
    parser.add_argument("--prompts", type=int, help="how many to draw")
    parser.add_argument("--picture", type=Path, help="save what was drawn as one picture")
    options = parser.parse_args()

    # The figures stand alone: what libraries say of a model this small is known.
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    pipeline = StableDiffusionXLPipeline.from_pretrained(options.pretrained_model_name_or_path)
    pipeline = pipeline.to(torch.float32)  # the files hold fp16, which not every loader turns
    pipeline.set_progress_bar_config(disable=True)

    if options.lora_path:
        figures, pictures = judge_lora(pipeline, options.lora_path, options.prompts or 50)
    else:
        figures, pictures = judge_base(pipeline, options.prompts or 200)
    print(json.dumps(figures, indent=1))

    if options.picture:
        rows = -(-len(pictures) // BATCH)
        gaps = rows * BATCH - len(pictures)  # which the grid does not take
        blank = [Image.new("RGB", pictures[0].size)] * gaps
        make_image_grid([*pictures, *blank], rows, BATCH).save(options.picture)


def judge_base(
    pipeline: StableDiffusionXLPipeline, prompts: int
) -> tuple[dict[str, float], list[Image.Image]]:
    """How often the base model draws what it is told.

    Args:
        pipeline: In fp32.
        prompts: How many to draw, of the world's 336 in a fixed order.

    Returns:
        Shares, from 0 to 1, of pictures whose shape colour, background and shape are as the prompt says; and
        the pictures.
    """
    scenes = plain_scenes()
    order = np.random.default_rng(0).permutation(len(scenes))[:prompts]
    scenes = [scenes[index] for index in order]

    pictures = draw(pipeline, scenes, BASE_GUIDANCE)
    pairs = list(zip(pictures, scenes, strict=True))
    figures = {
        "prompts": len(scenes),
        "colour": _share([judge.colour_of(picture) == scene.colour for picture, scene in pairs]),
        "background": _share([judge.background_of(picture) == scene.background for picture, scene in pairs]),
        "shape": _share([judge.shape_of(picture) == scene.shape for picture, scene in pairs]),
    }
    return figures, pictures


def judge_lora(
    pipeline: StableDiffusionXLPipeline, lora_path: Path, prompts: int
) -> tuple[dict[str, float], list[Image.Image]]:
    """How often a LoRA draws in its style, on prompts that it has not seen.

    Args:
        pipeline: In fp32; it carries the LoRA afterwards.
        lora_path: Folder or file.
        prompts: How many to draw, twice.

    Returns:
        Shares, from 0 to 1, of ink style without and with the LoRA, and of shape colours that survive it; and
        the pictures, those of the base model first.
    """
    scenes = unseen_scenes(prompts)
    base = draw(pipeline, scenes, LORA_GUIDANCE)

    file = lora_path / "pytorch_lora_weights.safetensors" if lora_path.is_dir() else lora_path
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    tuned = draw(pipeline, scenes, LORA_GUIDANCE)

    pairs = list(zip(tuned, scenes, strict=True))
    figures = {
        "unseen_prompts": len(scenes),
        "base_in_ink_style": _share([judge.is_ink(picture) for picture in base]),
        "lora_in_ink_style": _share([judge.is_ink(picture) for picture in tuned]),
        "lora_paper": _share([judge.has_paper(picture) for picture in tuned]),
        "lora_hatching": _share([judge.has_hatching(picture) for picture in tuned]),
        "lora_outline": _share([judge.has_outline(picture) for picture in tuned]),
        # A LoRA that forgot what it is told to draw would pass all of the above.
        "lora_keeps_colour": _share(
            [judge.colour_of_ink(picture) == scene.colour for picture, scene in pairs]
        ),
    }
    return figures, base + tuned


def draw(
    pipeline: StableDiffusionXLPipeline, scenes: list[Scene], guidance_scale: float
) -> list[Image.Image]:
    """One picture per scene; the n-th has seed n."""
    pictures: list[Image.Image] = []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        pictures += pipeline(
            [scene.caption for scene in batch],
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            # One each: with one for the batch, a picture would depend on those before it.
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(batch))],
        ).images
    return pictures


def _share(verdicts: list[bool]) -> float:
    return round(float(np.mean(verdicts)), 3)


if __name__ == "__main__":
    main()
