"""A card that a run fills: planned, corrected, tightened, given up, in this order; the LoRA is the same.

The card is as small as the model, a thousandth of a T4: what is compared are plans, not gigabytes.
"""

import re

import pytest
import torch

from lora_utils import stages
from lora_utils.memory.cards import T4, card_here
from lora_utils.memory.forecast import forecast
from lora_utils.storage.log import WEIGHTS_NAME
from lora_utils.system.device_memory import MemoryFullError
from lora_utils.training import loop

FULL = {"train_batch_size": 8, "gradient_accumulation_steps": 1, "checkpointing_steps": 1}
GOOD_STEPS = 5
SAID = re.compile(r"step (\d+): (a step took)|step (\d+) (did not fit)")


@pytest.fixture
def untroubled(on_card, tmp_path):
    """The LoRA of the same steps with room for all, and the bytes that these want."""
    config = on_card(
        max_train_steps=GOOD_STEPS, output_dir=tmp_path / "room", gradient_checkpointing="none", **FULL
    )
    list(stages.train(config))
    weights = (config.paths.run_folder / WEIGHTS_NAME).read_bytes()
    return weights, forecast(config, T4).stages["train"].reserved_gib


def test_plan_correction_tightening_and_the_end_come_in_this_order(
    on_card, card, untroubled, caplog, monkeypatch
):
    weights, needed_gib = untroubled
    real = loop.peak_memory_gib
    monkeypatch.setattr(loop, "peak_memory_gib", lambda: 1.15 * real())  # the forecast is that much off
    config = on_card(max_train_steps=GOOD_STEPS + 1, vram_gib=0.8 * needed_gib, **FULL)
    assert forecast(config, T4).plan.label == "auto"
    caplog.clear()
    done = []

    def fill():
        for report in stages.train(config):
            done.append(report.step)
            if report.step == 3:
                card.set_limit(int(0.97 * card.peak()))  # another program takes some of it
            if report.step == GOOD_STEPS:
                card.set_limit(card.allocated() + (1 << 20))

    with pytest.raises(MemoryFullError, match=f"the last good checkpoint is of step {GOOD_STEPS}"):
        fill()
    said = [(int(a or c), b or d) for a, b, c, d in SAID.findall(caplog.text)]
    assert done == list(range(1, GOOD_STEPS + 1))
    assert said[0] == (2, "a step took")
    assert {what for _, what in said[1:]} == {"did not fit"}
    assert sorted({step for step, _ in said[1:]}) == [4, GOOD_STEPS + 1]
    assert (config.paths.run_folder / WEIGHTS_NAME).read_bytes() == weights


def test_what_convolutions_take_beside_their_tensors_is_measured_and_forecast(on_card, card, caplog):
    """cuDNN's workspaces, which no count without a card knows."""
    config = on_card(max_train_steps=3, **FULL)
    without = forecast(config, card_here(torch.float16))
    card.set_workspace(int(0.1 * without.plan.predicted_bytes))
    expected = forecast(config, card_here(torch.float16)).plan.predicted_bytes
    assert expected > 1.03 * without.plan.predicted_bytes
    caplog.clear()
    list(stages.train(config))
    assert card.peak() == pytest.approx(expected, rel=0.02)
    assert SAID.findall(caplog.text) == []
