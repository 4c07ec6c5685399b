"""Draws a data set of the little world: ``python -m lora_utils.tiny.demo_data --output_dir data/demo_64px``.

Captioned pictures of what the tiny base model does not know: a style, ``ink`` (the demo's) or ``blueprint``,
or a subject, ``momo``.
"""

import argparse
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from lora_utils.tiny.drawing import SIDE_PX, SUBJECT
from lora_utils.tiny.world import STYLES, Scene, draw_plain, draw_styled, plain_scenes

SEED = 1
PICTURES = {"ink": 80, "blueprint": 80, "momo": 56}
"""Enough to learn from, with prompts left over. Half of the subject's set is known shapes: from the subject
alone, a LoRA draws it whatever it is asked for (prior preservation; Ruiz et al., 2023, section 3.2).
"""
Content = Literal["ink", "blueprint", "momo"]


def main() -> None:
    """Draw a set from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("data/demo_64px"))
    parser.add_argument("--content", choices=get_args(Content), default="ink", help="what is to be learned")
    parser.add_argument("--resolution", type=int, default=SIDE_PX, help="side of the pictures in pixels")
    options = parser.parse_args()
    draw_demo_data(options.output_dir, options.resolution, options.content)
    print(f"{PICTURES[options.content]} captioned pictures in {options.output_dir}")


def draw_demo_data(folder: Path, resolution_px: int = SIDE_PX, content: Content = "ink") -> None:
    """Write picture and caption files; equal on every call.

    Args:
        folder: Made where it is absent.
        resolution_px: Side of the pictures; the random draws are the same for all sizes.
        content: What is to be learned from them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(SEED)
    for number, scene in enumerate(demo_scenes(content)):
        picture = draw_content(scene, content, random, resolution_px)
        suffix = "png" if number % 2 else "jpg"  # both, since a user's folder holds both
        path = folder / f"{content}_{number:02d}.{suffix}"
        picture.save(path, quality=95)
        path.with_suffix(".txt").write_text(scene.caption + "\n", encoding="utf-8")


def draw_content(
    scene: Scene, content: Content, random: np.random.Generator, resolution_px: int = SIDE_PX
) -> Image.Image:
    """One picture of a set: in its style, or the subject in the base style; RGB, square."""
    styles = {style.name: style for style in STYLES}
    if content in styles:
        return draw_styled(scene, styles[content], random, resolution_px)
    picture = draw_plain(scene, random)
    return picture.resize((resolution_px, resolution_px), Image.Resampling.LANCZOS)


def demo_scenes(content: Content = "ink") -> list[Scene]:
    """The scenes of a set."""
    scenes = _shuffled(content)[: _count(content)]
    if content != SUBJECT:
        return scenes
    # Taken in turn, so that what is held out of the set holds both.
    others = _shuffled("ink")[: PICTURES[content] - len(scenes)]
    return [scene for pair in zip(scenes, others, strict=True) for scene in pair]


def unseen_scenes(count: int, content: Content = "ink") -> list[Scene]:
    """Scenes that are not in the set, for judging what a LoRA makes of new prompts."""
    return _shuffled(content)[_count(content) :][:count]


def _count(content: Content) -> int:
    """Pictures in a set of what is to be learned from it."""
    return PICTURES[content] // 2 if content == SUBJECT else PICTURES[content]


def _shuffled(content: Content) -> list[Scene]:
    # One order for both: what is in the set and what is unseen can never overlap.
    scenes = plain_scenes((SUBJECT,)) if content == SUBJECT else plain_scenes()
    return [scenes[index] for index in np.random.default_rng(SEED).permutation(len(scenes))]


if __name__ == "__main__":
    main()
