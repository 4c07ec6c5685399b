"""The package as a ``Contender`` of ``campaigns``."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.campaigns import Result
from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.model import lora
from lora_utils.storage.checkpoint import flatten_state, newest, read_checkpoint, step_of

RUN = Path("run")
TIMES = ("step_seconds", "data_seconds", "peak_memory_gib", "forecast_memory_gib")
"""What differs from run to run on one machine, so it does not count."""


@dataclass(frozen=True)
class Ours:
    """``train`` with ``resume_from_checkpoint=latest``, the same settings at every start."""

    settings: dict[str, Any]

    def steps(self) -> Iterator[int]:
        """Closed, it makes a checkpoint."""
        running = stages.train(
            load_config(None, self.settings | {"output_dir": RUN, "resume_from_checkpoint": "latest"})
        )
        try:
            for report in running:
                yield report.step
        finally:
            # Left to the garbage collector, an error of the checkpoint that this makes would be swallowed.
            running.close()  # pyright: ignore[reportAttributeAccessIssue]

    def checkpoints(self) -> list[Path]:
        """Folders named after their step."""
        return newest(RUN / "checkpoints", step_of)

    def result(self) -> Result:
        """Weights file, all tensors and numbers of the last checkpoint, log."""
        weights = hashlib.sha256((RUN / lora.WEIGHTS_NAME).read_bytes()).hexdigest()
        lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
        records = [tuple((key, line[key]) for key in line if key not in TIMES) for line in lines]
        state = read_checkpoint(self.checkpoints()[0]).state
        return Result(weights, digest(state), tuple(records))


def digest(state: Any) -> str:
    """SHA-256 of a nested state: structure, numbers and the bits of tensors."""
    tensors, rest = flatten_state(state)
    hasher = hashlib.sha256(json.dumps(rest).encode())
    for name, tensor in sorted(tensors.items()):
        # The shape too: equal bits in another shape are another tensor.
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
