"""How much slower precompute is than its encoders alone: ``python -m benchmarks precompute [--images 1000]``.

Side by side, alternating: the bare calls (weights loaded, every caption and every image through the encoders,
in the batches that the stage uses, pixels already in memory) and the whole stage (finding, hashing, decoding,
encoding, checking, writing). Then the stage again over unchanged data, and over data with one changed
picture.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.config.schema import RunConfig
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.text import CAPTIONS_PER_BATCH, encode_captions
from lora_utils.model.vae import encode_images, vae_batch
from lora_utils.system.device import best_device
from lora_utils.system.device_memory import free_memory

TINY = Path(stages.__file__).parent / "tiny"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        draw(work / "pictures", options.images, options.resolution)
        record.save("precompute", measure(work, options.images, options.resolution, options.rounds))


def draw(folder: Path, count: int, side_px: int) -> None:
    """Photographs' stand-ins: smooth noise, 1.5 times the resolution, JPEG; every one with a caption of its
    own.
    """
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        picture = small.resize((side_px * 3 // 2, side_px * 5 // 4), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:05d}.jpg", quality=92)
        (folder / f"{number:05d}.txt").write_text(f"a red star number {number} on a blue background")


def measure(work: Path, count: int, side_px: int, rounds: int) -> dict[str, object]:
    """All figures."""
    config = load_config(
        None,
        {
            "pretrained_model_name_or_path": str(TINY),
            "train_data_dir": work / "pictures",
            "output_dir": work / "run",
            "resolution": side_px,
        },
    )
    pixels = torch.randint(0, 256, (count, 3, side_px, side_px), dtype=torch.uint8)
    bare, first = [], []
    for _ in range(rounds):
        shutil.rmtree(config.paths.output_dir, ignore_errors=True)
        bare.append(seconds(lambda: encode_bare(config, pixels)))
        first.append(seconds(lambda: stages.precompute(config)))
    again = [seconds(lambda: stages.precompute(config)) for _ in range(rounds)]
    Image.new("RGB", (side_px, side_px), "red").save(work / "pictures" / "00007.jpg")
    changed = stages.precompute(config)
    ratios = [one / other for one, other in zip(bare, first, strict=True)]
    return {
        "images": count,
        "resolution": side_px,
        "bare_images_per_second": round(count / median(bare), 1),
        "stage_images_per_second": round(count / median(first), 1),
        "stage_over_bare": round(median(ratios), 3),
        "stage_over_bare_each_round": [round(ratio, 3) for ratio in ratios],
        "second_run_share_of_first": round(median(again) / median(first), 4),
        "second_run_ms_per_example": round(1000 * median(again) / count, 3),
        "encoded_after_one_change": [changed.encoded_images, changed.encoded_captions],
        "cache_files": len(list(changed.folder.iterdir())),
    }


def encode_bare(config: RunConfig, pixels: torch.Tensor) -> None:
    """The encoders' own work: nothing found, decoded, checked or written."""
    base = PretrainedSdxl(config.model)
    captions = [f"a red star number {number} on a blue background" for number in range(len(pixels))]
    texts = base.load_text_pipeline(torch.float32).to(best_device())
    for start in range(0, len(captions), CAPTIONS_PER_BATCH):
        encode_captions(texts, captions[start : start + CAPTIONS_PER_BATCH])
    del texts
    free_memory()
    vae = base.load_vae().to(best_device())
    batch = vae_batch(pixels.shape[-1] * pixels.shape[-2], torch.float32)
    for start in range(0, len(pixels), batch):
        encode_images(vae, pixels[start : start + batch].float() / 127.5 - 1)
    del vae
    free_memory()


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
