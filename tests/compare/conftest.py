"""One trained run for every test that draws with a LoRA; each gets a copy, whose pictures are its own."""

import shutil
from pathlib import Path

import pytest

from lora_utils import stages
from lora_utils.config.loading import load_config


@pytest.fixture(scope="session")
def finished_run(tiny_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = {"output_dir": folder, "max_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-2}
    list(stages.train(load_config(None, tiny_settings | settings)))
    return folder


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder
