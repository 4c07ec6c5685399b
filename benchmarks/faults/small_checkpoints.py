"""Checkpoints of a few hundred numbers: what is wrong with files does not depend on their size."""

from pathlib import Path
from typing import Any

import torch

from lora_utils.storage.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    step_of,
    write_checkpoint,
)
from lora_utils.system.files import sweep

KEEP = 2
"""Checkpoints that pruning leaves, as in a run."""
ABOUT = {
    "fingerprint": {"fixed": {}, "free": {}},
    "seconds": 1.5,
    "history": [],
    "held_out_loss_before": None,
}
"""What a checkpoint says of its run besides the state."""


def state_at(step: int) -> dict[str, Any]:
    """What a trainer's ``state_dict`` gives, with other numbers at every step."""
    generator = torch.Generator().manual_seed(step)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # One of everything that a real state holds: scalars, matrices, None, tuples, keys that are numbers.
    states = {
        0: {"step": torch.tensor(float(step)), "exp_avg": numbers(4, 8), "exp_avg_sq": numbers(4, 8)},
        1: {"step": torch.tensor(float(step)), "exp_avg": numbers(8, 4), "exp_avg_sq": numbers(8, 4)},
    }
    groups = [{"lr": 1e-3 / step, "betas": (0.9, 0.999), "fused": None, "params": [0, 1]}]
    return {
        "step": step,
        "micro_batches": 2 * step,
        "skipped": 0,
        "adapter": {"down.weight": numbers(4, 8), "up.weight": numbers(8, 4)},
        "average": {"down.weight": numbers(4, 8), "up.weight": numbers(8, 4)},
        "optimizer": {"state": states, "param_groups": groups},
        "scaler": {},
    }


def metrics_at(step: int) -> bytes:
    """A log with a line for each step."""
    return b"".join(b'{"step": %d, "loss": 0.5}\n' % number for number in range(1, step + 1))


def save(folder: Path, step: int) -> Path:
    """Write the checkpoint of a step and prune, as a run does."""
    written = write_checkpoint(folder, state_at(step), ABOUT, metrics_at(step))
    prune_checkpoints(folder, KEEP)
    return written


def save_two(folder: Path) -> None:
    """Steps 1 and 2."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in (1, 2):
        save(folder, step)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, after comparing every bit of it with what was saved."""
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None, "no checkpoint is left"
    assert_is(checkpoint, checkpoint.step)
    return checkpoint.step


def assert_is(checkpoint: Checkpoint, step: int) -> None:
    """It holds, bit by bit, what was saved at this step."""
    assert equal(checkpoint.state, state_at(step)), f"step {step} is not what was saved"
    about = {name: value for name, value in checkpoint.about.items() if name != "start"}  # which is random
    assert (checkpoint.metrics, about) == (metrics_at(step), ABOUT)


def assert_next_save_is_clean(folder: Path, step: int) -> None:
    """After a crash the next run sweeps, saves, and leaves only its checkpoints and what it set aside."""
    sweep(folder)
    save(folder, step)
    assert newest_step(folder) == step
    names = [path.name for path in folder.iterdir()]
    assert len([name for name in names if step_of(name) is not None]) == KEEP
    assert all(step_of(name) is not None or name.startswith(".bad-") for name in names), names


def equal(first: Any, second: Any) -> bool:
    """Whether two nested states are alike in types, numbers and bits."""
    if isinstance(first, torch.Tensor):
        if not isinstance(second, torch.Tensor):
            return False
        same_form = first.dtype == second.dtype and first.shape == second.shape
        # Bytes and not torch.equal: -0.0 is not 0.0 here, and a NaN is itself.
        return same_form and first.numpy().tobytes() == second.numpy().tobytes()
    if isinstance(first, dict):
        # Their order too: an optimiser's states belong to parameters by position.
        return isinstance(second, dict) and equal(list(first.items()), list(second.items()))
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second
