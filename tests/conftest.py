"""The tiny SDXL and a few demo pictures, for every test that needs something real."""

import gc
import os
import sys

os.environ.setdefault("LORA_PRESET", "ci")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Equal bytes and fp32 are a CPU's: where there is a GPU, the tests marked for it alone see it.
if os.environ.get("LORA_TEST_GPU") != "1" and "pretended" not in sys.modules:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from lora_utils.config.loading import load_config
from lora_utils.memory.planning import count_recomputed, step_shape, training_footprint
from lora_utils.model.architectures import find_architecture
from lora_utils.system.device import choose_precision
from lora_utils.system.units import GIB
from lora_utils.tiny.demo_data import draw_demo_data

ROOT = Path(__file__).parents[1]
TINY = ROOT / "lora_utils" / "tiny"
LONGEST = ("tiny", "whole", "training", "compare")
torch.set_num_threads(1)

# What is imported stays for good; else whoever frees memory looks through all of it, for a third of a second.
gc.collect()
gc.freeze()


def pytest_collection_modifyitems(items):
    """Rooms with the longest files first: no worker is to be left alone with one of them at the end."""
    places = {room: place for place, room in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(LONGEST)))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    draw_demo_data(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(demo_folder, tmp_path_factory):
    """Ten captioned pictures."""
    folder = tmp_path_factory.mktemp("data")
    for path in sorted(demo_folder.iterdir())[:20]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def pictures(data_dir, tmp_path):
    """The ten pictures, in a folder of their own."""
    folder = tmp_path / "pictures"
    shutil.copytree(data_dir, folder)
    return folder


@pytest.fixture(scope="session")
def precompute_dir(tmp_path_factory):
    """One cache for all tests: it is addressed by content, so they can share it."""
    return tmp_path_factory.mktemp("precomputed")


@pytest.fixture(scope="session")
def tiny_settings(data_dir, precompute_dir):
    """What every run on the ten pictures has."""
    return {
        "pretrained_model_name_or_path": str(TINY),
        "train_data_dir": data_dir,
        "precompute_dir": precompute_dir,
        "resolution": 64,
        # Half the time of all layers, the default, which presets and whatever is about layers train.
        "target_modules": "attn",
    }


@pytest.fixture
def make_config(tmp_path, tiny_settings):
    def make(**overrides):
        quick = tiny_settings | {
            "output_dir": tmp_path / "run",
            "max_train_steps": 3,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "prompt": ["a red star on a blue background"],
            "num_inference_steps": 3,
            "guidance_scale": 4.0,
        }
        return load_config(None, quick | overrides)

    return make


@pytest.fixture
def tight_gib():
    """Of a run's settings: a budget half-way between nothing and everything recomputed."""

    def tight(config):
        precision = choose_precision(config.model.mixed_precision, None)
        architecture = find_architecture(config.model, config.paths.cache_dir)
        shape = step_shape(config, precision, architecture, config.data.resolution)
        needed = training_footprint(shape).needed_bytes, count_recomputed(shape).needed_bytes
        assert needed[1] < needed[0]
        return sum(needed) / 2 / GIB

    return tight


@pytest.fixture(scope="session")
def tiny_pipeline():
    pipeline = StableDiffusionXLPipeline.from_pretrained(TINY).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def fresh_pipeline():
    pipeline = StableDiffusionXLPipeline.from_pretrained(TINY).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
