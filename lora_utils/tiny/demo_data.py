"""Draws the demo data set: ``python -m lora_utils.tiny.demo_data --output_dir data/demo_64px``.

Captioned pictures of the tiny model's world in another style: dark outlines on hatched cream paper.
"""

import argparse
from pathlib import Path

import numpy as np

from lora_utils.tiny.world import SIZE_PX, Scene, draw_ink, plain_scenes

SEED = 1
PICTURES = 80
"""Of the world's 336 scenes: enough to learn a style from, with most prompts left to judge it by."""


def main() -> None:
    """Draw the set from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("data/demo_64px"))
    parser.add_argument("--resolution", type=int, default=SIZE_PX, help="side of the pictures in pixels")
    options = parser.parse_args()
    draw_demo_data(options.output_dir, options.resolution)
    print(f"{PICTURES} captioned pictures in {options.output_dir}")


def draw_demo_data(folder: Path, resolution_px: int = SIZE_PX) -> None:
    """Write picture and caption files; equal on every call.

    Args:
        folder: Made where it is absent.
        resolution_px: Side of the pictures; the random draws are the same for all sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(SEED)
    for number, scene in enumerate(demo_scenes()):
        picture = draw_ink(scene, random, resolution_px)
        suffix = "png" if number % 2 else "jpg"  # both, since a user's folder holds both
        path = folder / f"ink_{number:02d}.{suffix}"
        picture.save(path, quality=95)
        path.with_suffix(".txt").write_text(scene.caption + "\n", encoding="utf-8")


def demo_scenes() -> list[Scene]:
    """The scenes of the set: 80 of the world's 336."""
    return _shuffled()[:PICTURES]


def unseen_scenes(count: int) -> list[Scene]:
    """Scenes that are not in the set, for judging what a LoRA makes of new prompts."""
    return _shuffled()[PICTURES : PICTURES + count]


def _shuffled() -> list[Scene]:
    # One order for both: what is in the set and what is unseen can never overlap.
    scenes = plain_scenes()
    return [scenes[index] for index in np.random.default_rng(SEED).permutation(len(scenes))]


if __name__ == "__main__":
    main()
