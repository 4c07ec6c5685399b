"""A kernel timed again and again, and the shapes that an SDXL step consists of."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.device import Settings, synchronise

GEMMS = [
    (1024, 1280, 1280),
    (1024, 1280, 10240),
    (4096, 640, 640),
    (4096, 640, 5120),
    (1024, 1280, 32),
    (4096,) * 3,
]
"""Rows, inputs, outputs."""
CONVOLUTIONS = [(320, 128), (640, 64), (1280, 32)]
"""Channels, side."""
ATTENTIONS = [(10, 4096, 4096), (20, 1024, 1024), (10, 4096, 77), (20, 1024, 77)]
"""Heads, queries, keys."""
HEAD = 64


class Bench:
    """Random tensors on the device, and the time of what is done with them; a rehearsal's are small."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.device
        self.share = 16 if settings.rehearse else 1
        self.dtype = torch.float16

    def draw(self, *shape: int) -> Tensor:
        """Normal, fp16."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run: the median of five groups, a third of a second in all, by events on a GPU."""
        run()  # the first one chooses and loads kernels
        once = self.group(run, 1)
        runs = max(1, min(1000, int((0.001 if self.settings.rehearse else 0.06) / once)))
        return statistics.median(self.group(run, runs) / runs for _ in range(5))

    def group(self, run: Callable[[], object], runs: int) -> float:
        """Seconds of so many runs, one after the other."""
        synchronise(self.settings)
        if self.device.type == "cpu":
            started = time.perf_counter()
            for _ in range(runs):
                run()
            return time.perf_counter() - started
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(runs):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
