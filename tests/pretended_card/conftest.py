"""Every test here runs on a pretended T4; in a session without one, none is collected."""

import logging
import shutil

import pytest

from lora_utils.config.loading import load_config
from lora_utils.memory import rates
from lora_utils.memory.cards import T4
from tests.pretended_card.pretend import installed

LIBRARY_BYTES = 4096
"""Tables of bitsandbytes that stay on the card for the next run."""
collect_ignore_glob = [] if installed() else ["test_*.py"]


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """The compiled module, with a T4's memory and rates, nothing on it and nothing counted."""
    module = installed()
    assert module is not None
    limit = module.limit()
    module.clear_counts()
    module.reset_peak()
    # Measuring would multiply 4096 x 4096 on the CPU.
    found = T4.gemm_tflops, T4.conv_tflops, T4.attention_tflops, T4.bandwidth_gbs
    monkeypatch.setattr(rates, "measure_rates", lambda device, dtype: found)
    yield module
    module.fail_after(0, "")
    module.set_limit(limit)
    module.set_workspace(0)


@pytest.fixture
def on_card(tmp_path, tiny_settings, caplog):
    """Settings of a short run on the card, in the precision that a T4 gets."""
    caplog.set_level(logging.WARNING)

    def make(**changes):
        quick = tiny_settings | {
            "output_dir": tmp_path / "run",
            "max_train_steps": 3,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "rank": 4,
            "learning_rate": 1e-3,
            "prompt": ["a red star on a blue background"],
            "num_inference_steps": 2,
        }
        return load_config(None, quick | changes)

    yield make
    shutil.rmtree(tmp_path, ignore_errors=True)
