"""The short checks of ``python -m benchmarks gpu --smoke`` hold on the pretended card, on small shapes."""

import math

import pytest
import torch

from benchmarks.gpu import jobs
from benchmarks.gpu.device import Settings
from benchmarks.gpu.smoke import CHECKS, RUN, STEP
from lora_utils.model import architectures
from lora_utils.system.device_memory import free_memory
from tests.pretended_card.conftest import LIBRARY_BYTES


@pytest.fixture
def done(monkeypatch, tmp_path, card):
    """What a check finds, by its name."""
    monkeypatch.setattr(Settings, "device", torch.device("cuda"))
    for name, small in {"UNET": jobs.SMALL_UNET, "VAE": jobs.SMALL_VAE}.items():
        monkeypatch.setattr(architectures, name, getattr(architectures, name) | small)
    checks = {check.name: check for check in CHECKS}

    def done(name):
        settings = Settings(warmup=1, steps=1, rehearse=True, work=str(tmp_path))
        found = jobs.CHECKS[checks[name].function](checks[name], settings)
        free_memory()
        assert card.allocated() <= LIBRARY_BYTES
        return found

    return done


def test_nodes_are_as_exact_as_their_dtype(done):
    for node, errors in done("nodes").items():
        assert max(errors) < (1e-3 if "float16" in node else 1e-5)


@pytest.mark.parametrize("base", ["fp16", "nf4"])
def test_a_step_and_a_held_out_batch_are_measured(base, done):
    found = done(STEP + base)
    assert found["training_gib"] > found["held_out_gib"] > 0
    assert all(map(math.isfinite, found["losses"]))


def test_what_a_t4_is_refused_is_told(done):
    assert "sm_80" in done("bf16")["refused"]


def test_a_card_that_fills_up_makes_the_run_recompute(done):
    found = done("out of memory")
    assert found["failures"] > 0
    assert "recomputed" in found["plan"]
    assert found["losses"] == pytest.approx(found["with_room"], rel=1e-3)


def test_a_whole_run_says_what_it_took(done):
    found = done(RUN)
    assert found["steps"] == 6
    assert found["peak_gib"] > 0
    assert 0 < found["step_seconds"] <= found["run_seconds"]
