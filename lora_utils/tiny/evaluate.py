"""How well the tiny SDXL, or a LoRA on it, draws: ``python -m lora_utils.tiny.evaluate [--lora_path DIR]``.

Without a LoRA, 200 prompts of the base model's world are judged, and 50 in landscape and in portrait. With
one, prompts that are not in its data set, drawn by the base model and by the LoRA on equal seeds.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from diffusers.utils import make_image_grid
from PIL import Image
from transformers.utils import logging as transformers_logging

from lora_utils.tiny import judge
from lora_utils.tiny.demo_data import Content, unseen_scenes
from lora_utils.tiny.drawing import SQUARE, SUBJECT, Size
from lora_utils.tiny.world import LANDSCAPE, PORTRAIT, STYLES, Scene, plain_scenes

FOLDER = Path(__file__).parent
BATCH = 25
"""Pictures that are drawn together, and that stand in a row of ``--picture``."""
STEPS = 20
"""Of the sampler."""
BASE_GUIDANCE = 4.0
LORA_GUIDANCE = 3.0
PROMPTS = 200
OTHER_SIZES_DIVISOR = 4
"""One of so many prompts is drawn in landscape and in portrait as well."""
LORA_PROMPTS = 50

Pictures = list[Image.Image]


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained_model_name_or_path", type=Path, default=FOLDER)
    parser.add_argument("--lora_path", type=Path, help="folder or file of the LoRA to judge")
    parser.add_argument("--content", choices=get_args(Content), default="ink", help="what it has learned")
    parser.add_argument("--prompts", type=int, help="how many to draw")
    parser.add_argument("--picture", type=Path, help="save what was drawn as one picture")
    options = parser.parse_args()
    if options.content == SUBJECT and options.prompts == 1:
        parser.error("--prompts: of the subject one half has its word, one half not; give 2 or more")

    # The figures stand alone: what libraries say of a model this small is known.
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    pipeline = StableDiffusionXLPipeline.from_pretrained(options.pretrained_model_name_or_path)
    pipeline = pipeline.to(torch.float32)  # the files hold fp16, which not every loader turns
    pipeline.set_progress_bar_config(disable=True)

    if options.lora_path:
        prompts = options.prompts or LORA_PROMPTS
        figures, pictures = judge_lora(pipeline, options.lora_path, prompts, options.content)
    else:
        figures, pictures = judge_base(pipeline, options.prompts or PROMPTS)
    print(json.dumps(figures, indent=1))
    if options.picture:
        _grid(pictures).save(options.picture)


def judge_base(pipeline: StableDiffusionXLPipeline, prompts: int) -> tuple[dict[str, float], Pictures]:
    """How often the base model draws what it is told.

    Args:
        pipeline: In fp32.
        prompts: How many to draw, of the world's 336 in a fixed order.

    Returns:
        Shares, from 0 to 1, of pictures whose shape colour, background and shape are as the prompt says, and
        of landscapes and portraits that show one shape and not two; and the square pictures.
    """
    scenes = plain_scenes()
    order = np.random.default_rng(0).permutation(len(scenes))[:prompts]
    scenes = [scenes[index] for index in order]

    pictures = draw(pipeline, scenes, BASE_GUIDANCE)
    pairs = list(zip(pictures, scenes, strict=True))
    figures = {
        "prompts": len(scenes),
        "colour": _share(judge.colour_of(picture) == scene.colour for picture, scene in pairs),
        "background": _share(judge.background_of(picture) == scene.background for picture, scene in pairs),
        "shape": _share(judge.shape_of(picture) == scene.shape for picture, scene in pairs),
    }
    fewer = scenes[: -(-len(scenes) // OTHER_SIZES_DIVISOR)]
    for name, size in (("landscape", LANDSCAPE), ("portrait", PORTRAIT)):
        others = draw(pipeline, fewer, BASE_GUIDANCE, size)
        figures[f"{name}_of_one_shape"] = _share(judge.count_shapes(picture) == 1 for picture in others)
        figures[f"{name}_shape"] = _share(
            judge.shape_of(picture) == scene.shape for picture, scene in zip(others, fewer, strict=True)
        )
    return figures, pictures


def judge_lora(
    pipeline: StableDiffusionXLPipeline, lora_path: Path, prompts: int, content: Content = "ink"
) -> tuple[dict[str, float], Pictures]:
    """How often a LoRA draws what it has learned, on prompts that it has not seen.

    Args:
        pipeline: In fp32; it carries the LoRA afterwards.
        lora_path: Folder or file.
        prompts: How many to draw, twice.
        content: A style, or the subject.

    Returns:
        Shares, from 0 to 1; and the pictures, those of the base model first.
    """
    scenes = prompts_for(content, prompts)
    base = draw(pipeline, scenes, LORA_GUIDANCE)
    file = lora_path / "pytorch_lora_weights.safetensors" if lora_path.is_dir() else lora_path
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    tuned = draw(pipeline, scenes, LORA_GUIDANCE)

    lora = judge_content(tuned, scenes, content)
    learned = next(iter(lora))
    figures: dict[str, float] = {"unseen_prompts": len(scenes)}
    figures[f"base_{learned}"] = judge_content(base, scenes, content)[learned]
    return figures | {f"lora_{name}": share for name, share in lora.items()}, base + tuned


def prompts_for(content: Content, count: int) -> list[Scene]:
    """Unseen scenes to judge a LoRA by: of the subject half without its word, which should not show it."""
    if content == SUBJECT:
        with_word = unseen_scenes(count // 2, content)
        return [*with_word, *unseen_scenes(count - len(with_word))]
    return unseen_scenes(count, content)


def judge_content(pictures: Pictures, scenes: Sequence[Scene], content: Content) -> dict[str, float]:
    """Shares of pictures, from 0 to 1: first those that show what was to be learned, last kept prompts."""
    pairs = list(zip(pictures, scenes, strict=True))
    if content == SUBJECT:
        with_word = [pair for pair in pairs if pair[1].shape == SUBJECT]
        without = [pair for pair in pairs if pair[1].shape != SUBJECT]
        return {
            "shows_subject": _share(judge.shape_of(picture) == SUBJECT for picture, _ in with_word),
            "shows_subject_unasked": _share(judge.shape_of(picture) == SUBJECT for picture, _ in without),
            "keeps_colour": _share(judge.colour_of(picture) == scene.colour for picture, scene in pairs),
            "keeps_shape": _share(judge.shape_of(picture) == scene.shape for picture, scene in without),
        }
    style = next(style for style in STYLES if style.name == content)
    return {
        "in_style": _share(judge.in_style(picture, style) for picture in pictures),
        "paper": _share(judge.has_paper(picture, style) for picture in pictures),
        "lines": _share(judge.has_lines(picture, style) for picture in pictures),
        "outline": _share(judge.has_outline(picture, style) for picture in pictures),
        # A LoRA that forgot what it is told to draw would pass all of the above.
        "keeps_colour": _share(
            judge.colour_in_style(picture, style) == scene.colour for picture, scene in pairs
        ),
        "keeps_shape": _share(
            judge.shape_in_style(picture, style) == scene.shape for picture, scene in pairs
        ),
    }


def draw(
    pipeline: StableDiffusionXLPipeline, scenes: Sequence[Scene], guidance_scale: float, size: Size = SQUARE
) -> Pictures:
    """One picture per scene; the n-th has seed n."""
    pictures: Pictures = []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        pictures += pipeline(
            [scene.caption for scene in batch],
            height=size.height_px,
            width=size.width_px,
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            # One each: with one for the batch, a picture would depend on those before it.
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(batch))],
        ).images
    return pictures


def _grid(pictures: Pictures) -> Image.Image:
    rows = -(-len(pictures) // BATCH)
    gaps = rows * BATCH - len(pictures)  # which the grid does not take
    blank = [Image.new("RGB", pictures[0].size)] * gaps
    return make_image_grid([*pictures, *blank], rows, BATCH)


def _share(verdicts: Iterable[bool]) -> float:
    return round(float(np.mean(list(verdicts))), 3)


if __name__ == "__main__":
    main()
