"""The device under test: its memory capped, another card's kernels chosen, and what a step takes on it.

On a CPU, for rehearsals, wall time stands for events, operators for kernels, and memory is not counted.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lora_utils.system.determinism import FIXED_WORKSPACES, WORKSPACE
from lora_utils.system.device_memory import free_memory
from lora_utils.system.units import GIB

MESSAGE_LENGTH = 300
TURING_WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8", "CUBLASLT_WORKSPACE_SIZE": "1024"}


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    vram_gib: float | None = None
    """Most that torch may reserve; all of the card when not given."""
    emulate: str | None = None
    """sm75: the kernels that torch would choose on a T4, never its speed."""
    warmup: int = 3
    steps: int = 12
    rehearse: bool = False
    """On the CPU, with small shapes."""
    deterministic: bool = False
    """With torch's deterministic algorithms; has to be known before CUDA starts."""
    work: str = ""
    """Folder for what runs leave to each other."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")


def prepare(settings: Settings) -> None:
    """Cap the memory and choose the kernels; call before anything is on the device."""
    if settings.emulate == "sm75":
        os.environ.update(TURING_WORKSPACES)  # else 32 MiB each on Hopper
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if settings.deterministic:
        os.environ[WORKSPACE] = FIXED_WORKSPACES[0]
    torch.backends.cudnn.benchmark = False
    if settings.vram_gib and not settings.rehearse:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.vram_gib * GIB / total))


def attention(settings: Settings) -> AbstractContextManager[Any]:
    """What attention may run on: a T4 has no flash attention, so torch takes the memory-efficient kernel.

    Where that refuses a shape, the plain one stands in, as on a T4; ``kernels_of`` counts how often not.
    """
    if settings.emulate != "sm75" or settings.rehearse:
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def facts() -> dict[str, Any]:
    """Of the card, or None of everything."""
    if not torch.cuda.is_available():
        return {"name": None, "usable_gib": None}
    free, total = torch.cuda.mem_get_info()
    return {"name": torch.cuda.get_device_name(0), "usable_gib": free / GIB, "total_gib": total / GIB}


def measure(run: Callable[[], object], settings: Settings) -> dict[str, Any]:
    """Memory, milliseconds and kernels of something that can be run again and again.

    The kernels' own time comes from one more run under the profiler; it is left out where that does not fit.
    """
    on_gpu = settings.device.type == "cuda"
    free_memory()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(settings.warmup):
        run()
    milliseconds = timed(run, settings)
    figures: dict[str, Any] = {
        "ms": statistics.median(milliseconds),
        "ms_lowest": min(milliseconds),
        "ms_highest": max(milliseconds),
        **peaks(),
    }
    try:
        return figures | kernels_of(run, settings)
    except (RuntimeError, AssertionError, OSError, ValueError) as error:
        # Of memory, of the profiler or of its file: the times were measured, and are worth keeping.
        return figures | {"kernels": None, "kernel_ms": None, "profiler": str(error)[:MESSAGE_LENGTH]}


def peaks() -> dict[str, float | None]:
    """Most that tensors took, and that torch reserved, since the last reset, in GiB; None on a CPU."""
    if not torch.cuda.is_initialized():
        return {"allocated_gib": None, "reserved_gib": None}
    allocated = torch.cuda.max_memory_allocated()
    reserved = torch.cuda.max_memory_reserved()
    return {"allocated_gib": allocated / GIB, "reserved_gib": reserved / GIB}


def kernels_of(run: Callable[[], object], settings: Settings) -> dict[str, float]:
    """Launches and summed duration of the kernels of one run, from the profiler's trace."""
    on_gpu = settings.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        run()
        synchronise(settings)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    category = "kernel" if on_gpu else "cpu_op"
    launches = [event for event in events if event.get("cat") == category]
    return {
        "kernels": len(launches),
        "kernel_ms": sum(event["dur"] for event in launches) / 1000,
        "efficient_attention_kernels": sum("fmha" in event["name"] for event in launches),
    }


def synchronise(settings: Settings) -> None:
    """Wait for the device."""
    if settings.device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], settings: Settings) -> list[float]:
    """Milliseconds of each of ``settings.steps`` runs, by events on a GPU."""
    if settings.device.type == "cpu":
        stamps = [time.perf_counter()]
        for _ in range(settings.steps):
            run()
            stamps.append(time.perf_counter())
        return [1000 * (end - start) for start, end in pairwise(stamps)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(settings.steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]
