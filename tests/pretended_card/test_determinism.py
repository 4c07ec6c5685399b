"""``deterministic``: torch's own switches, on for as long as a run lasts."""

import os

import pytest
import torch

from lora_utils import stages
from lora_utils.system.determinism import FIXED_WORKSPACES, WORKSPACE, deterministic_algorithms
from lora_utils.system.device import MachineError


@pytest.mark.parametrize("is_wanted", [True, False])
def test_it_is_on_in_a_run_that_asks_for_it_and_off_again_after(on_card, monkeypatch, is_wanted):
    monkeypatch.setenv(WORKSPACE, FIXED_WORKSPACES[0])
    running = stages.train(on_card(deterministic=is_wanted))
    next(running)
    assert torch.are_deterministic_algorithms_enabled() == is_wanted
    running.close()
    assert not torch.are_deterministic_algorithms_enabled()


def test_where_cuda_has_not_started_cublas_is_told(monkeypatch):
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with deterministic_algorithms(True):
        assert os.environ[WORKSPACE] == FIXED_WORKSPACES[0]


def test_where_it_comes_too_late_the_sentence_says_what_to_do(on_card, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    with pytest.raises(MachineError, match="restart the notebook's kernel"):
        list(stages.train(on_card(deterministic=True)))
