"""How often a step makes the host wait for the card, and copies to it."""

import pytest

from lora_utils import stages

STEPS = 5
OPTIMIZERS = {
    "adamw": {},
    "adafactor": {"optimizer": "adafactor"},
    "all recomputed": {"gradient_checkpointing": "full"},
    "nf4": {"base_precision": "nf4"},
    "dropout": {"lora_dropout": 0.1},
    "average": {"use_ema": True},
    "min-SNR": {"snr_gamma": 5},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_waits_once_and_copies_once_a_micro_batch(name, on_card, card):
    config = on_card(max_train_steps=STEPS, gradient_accumulation_steps=3, **OPTIMIZERS[name])
    waits, copies = [], []
    for _ in stages.train(config):
        counts = card.counts()
        waits.append(counts.get(card.WAIT, 0))
        copies.append(counts.get(card.UPLOAD, 0))
        card.clear_counts()
    # The first step begins with a whole run's preparation, the last one ends with its checkpoint.
    assert waits[1:-1] == [1] * (STEPS - 2)
    assert copies[1:-1] == [3] * (STEPS - 2)
