"""How good the forecast is: against a real allocator, against published figures, and as a planner.

The published figures are those of issue 4: SDXL's U-Net, one step, adapters of rank 32 on attention, counted
once with fake tensors on the CPU. Here the same graphs are rebuilt and counted anew, and then the project's
own.
"""

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

from benchmarks.memory import accuracy
from benchmarks.memory.peer_graphs import ALL, Graph, count
from benchmarks.record import save
from lora_utils.config.training import LoraConfig
from lora_utils.memory.cards import T4
from lora_utils.memory.footprint import Footprint
from lora_utils.memory.gradient_checkpointing import Plan
from lora_utils.memory.planning import plan_step
from lora_utils.memory.unet_footprint import StepShape, training_footprint
from lora_utils.model import architectures
from lora_utils.system.units import GIB

PEERS = {  # allocated and reserved GiB, TFLOP, kernels, T4 milliseconds
    "diffusers' script, nothing recomputed": (
        Graph("peft", autocast=True, resident=True),
        (14.47, 14.92, 14.7, 14469, 1168),
    ),
    "diffusers' script": (
        Graph("peft", autocast=True, resident=True, recompute="full"),
        (7.81, 8.60, 19.9, 21267, 1566),
    ),
    "sd-scripts": (
        Graph("plain", autocast=True, recompute="reentrant", targets=ALL),
        (6.58, 7.15, 21.7, 24375, 1770),
    ),
    "OneTrainer": (
        Graph("plain", autocast=True, recompute="full", targets=ALL),
        (6.49, 7.12, 21.2, 24017, 1724),
    ),
    "one node, fused": (Graph("node", True), (9.70, 10.11, 14.6, 7004, 963)),
    "one node, fused, 722 linears": (Graph("node", True, targets=ALL), (11.28, 11.63, 14.8, 7974, 1002)),
}
ATTENTION = LoraConfig(rank=32, target_modules=["attn"])
"""The layers that diffusers' example script adapts: with them, both do the same work."""
BLOCKS = r".*transformer_blocks\.\d+"
WIDE = r"(down|up)_blocks\.1\..*transformer_blocks\.\d+"  # 640 channels, 4096 tokens
MATRIX = {  # batch 1, 2, 4: allocated, reserved, milliseconds
    "none": (Graph(), ((10.67, 11.07, 1001), (15.96, 16.42, 1964), (26.56, 27.23, 3890))),
    "fused": (Graph(fused=True), ((9.68, 10.14, 1010), (14.00, 14.53, 1981), (22.62, 23.46, 3923))),
    "fused, wide feed-forwards": (
        Graph(fused=True, recompute=WIDE + r"\.ff"),
        ((9.34, 9.79, 1025), (13.31, 13.83, 2012), (21.26, 22.07, 3984)),
    ),
    "fused, all feed-forwards": (
        Graph(fused=True, recompute=BLOCKS + r"\.ff"),
        ((8.32, 8.74, 1104), (11.26, 11.78, 2168), (17.16, 17.96, 4297)),
    ),
    "fused, wide blocks, other feed-forwards": (
        Graph(fused=True, recompute=rf"{WIDE}|(?!{WIDE}){BLOCKS}\.ff"),
        ((7.76, 8.24, 1154), (10.15, 10.72, 2267), (14.94, 15.78, 4493)),
    ),
    "fused, all blocks": (
        Graph(fused=True, recompute=BLOCKS),
        ((6.03, 6.62, 1270), (6.76, 7.51, 2485), (8.21, 9.29, 4915)),
    ),
    "full": (Graph(recompute="full"), ((5.81, 6.40, 1321), (6.32, 7.04, 2588), (7.34, 8.36, 5120))),
}
# Side: allocated, reserved, milliseconds with nothing and with everything recomputed; allocated with nf4.
RESOLUTIONS = {
    512: (6.47, 6.61, 239, 321, 3.4),
    768: (7.81, 8.17, 527, 697, 4.8),
    1024: (9.68, 10.1, 1010, 1321, 6.6),
    1152: (10.8, 11.6, 1348, 1755, 7.8),
    1280: (12.1, 12.8, 1766, 2290, 9.0),
    1536: (15.0, 16.2, 2899, 3727, 12.0),
}


def main() -> None:
    """Print everything, and keep it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=["cost", "accuracy", "published", "own", "planner"], nargs="*")
    wanted = parser.parse_args().only or ["cost", "accuracy", "published", "own", "planner"]
    parts = {
        "cost": cost,
        "accuracy": accuracy.measure,
        "published": published,
        "own": own,
        "planner": planner,
    }
    save("forecast", {name: parts[name]() for name in wanted})


def cost() -> dict[str, Any]:
    """Wall seconds and memory of one whole forecast, imports included and nothing remembered."""
    code = (
        "import tempfile, resource; from lora_utils.memory.forecast import forecast;"
        "from lora_utils.memory.cards import find_card;"
        "from lora_utils.config.training import LoraConfig;"
        "from lora_utils.config.schema import RunConfig, PathsConfig;"
        "folder = tempfile.mkdtemp();"
        "config = RunConfig(paths=PathsConfig(cache_dir=folder), lora=LoraConfig(rank=32));"
        "forecast(config, find_card('t4')); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wall = time.monotonic() - started
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return {
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "rss_gib": round(float(done.stdout), 2),
    }


def published() -> list[dict[str, Any]]:
    """Graphs of others, and the matrix: counted here, published, and by how many percent they differ."""
    rows = [_row(name, graph, figures) for name, (graph, figures) in PEERS.items()]
    for name, (graph, cells) in MATRIX.items():
        for batch, (allocated, reserved, milliseconds) in zip((1, 2, 4), cells, strict=True):
            cell = replace(graph, batch=batch)
            rows.append(_row(f"{name}, batch {batch}", cell, (allocated, reserved, None, None, milliseconds)))
    for side, (allocated, reserved, plain, full, quantised) in RESOLUTIONS.items():
        fused = Graph(fused=True, side_px=side)
        rows.append(_row(f"{side} px, fused", fused, (allocated, reserved, None, None, plain)))
        rows.append(
            _row(f"{side} px, full", Graph(recompute="full", side_px=side), (None, None, None, None, full))
        )
        nf4 = Graph(fused=True, side_px=side, base="nf4")
        rows.append(_row(f"{side} px, fused, nf4", nf4, (quantised, None, None, None, None)))
    return rows


def _row(name: str, graph: Graph, figures: tuple[float | None, ...]) -> dict[str, Any]:
    simulation, reserved = count(graph)
    work = simulation.work()
    seconds = T4.seconds(work.flops, work.streamed_bytes, 0)
    values = (simulation.peak_bytes / GIB, reserved / GIB, work.tflop, work.kernels, 1000 * seconds)
    row: dict[str, Any] = {"graph": name}
    names = ("allocated_gib", "reserved_gib", "tflop", "kernels", "t4_roofline_ms")
    for key, counted, published in zip(names, values, figures, strict=True):
        row[key] = round(counted, 3)
        if published is not None:
            row[f"{key}_published"] = published
            row[f"{key}_error_percent"] = round(100 * (counted / published - 1), 2)
    print(row, flush=True)
    return row


def own() -> list[dict[str, Any]]:
    """The project's own step: with the layers that others adapt, and with its default's, all of them."""
    default = LoraConfig(rank=32)
    low_memory = {"base": "nf4", "optimizer": "adamw8bit", "plan": Plan((), "full")}
    shapes = {
        "default": _shape(lora=default),
        "default, full": _shape(lora=default, plan=Plan((), "full")),
        "default, int8": _shape(lora=default, base="int8"),
        "default, nf4": _shape(lora=default, base="nf4"),
        "default, nf4, 1536 px": _shape(lora=default, base="nf4", size_px=(1536, 1536)),
        "default, low memory: nf4, full, 8-bit Adam, rank 8": _shape(lora=LoraConfig(rank=8), **low_memory),
        "lean": _shape(),
        "lean, full": _shape(plan=Plan((), "full")),
        "lean, 722 linears": _shape(lora=LoraConfig(rank=32, target_modules=["attn+ff"])),
        "peft": _shape(is_lean=False),
    }
    return [{"step": name, **_figures(training_footprint(shape))} for name, shape in shapes.items()]


def _shape(**changes: Any) -> StepShape:
    usual = {
        "unet": architectures.UNET,
        "lora": ATTENTION,
        "precision": "fp16",
        "base": "plain",
        "optimizer": "adamw",
        "batch": 1,
        "size_px": (1024, 1024),
        "tokens": 77,
    }
    return StepShape(**(usual | changes))


def _figures(footprint: Footprint) -> dict[str, Any]:
    work = footprint.work
    row = {
        "allocated_gib": round(footprint.peak_bytes / GIB, 3),
        "reserved_gib": round(footprint.reserved_bytes / GIB, 3),
        "needed_gib": round(footprint.needed_bytes / GIB, 3),
        "tflop": round(work.tflop, 2),
        "kernels": work.kernels,
        "t4_roofline_ms": round(1000 * T4.seconds(work.flops, work.streamed_bytes, work.kernels)),
    }
    print(row, flush=True)
    return row


def planner() -> list[dict[str, Any]]:
    """What is recomputed on a T4, and how near the plan comes to the budget."""
    rows = []
    cells = [("plain", batch, 14.3) for batch in (1, 2, 3, 4, 6)] + [
        ("nf4", batch, 14.3) for batch in (1, 2, 4, 6)
    ]
    for base, batch, budget in [*cells, ("plain", 1, 8.0), ("nf4", 1, 3.55)]:
        step = plan_step(_shape(base=base, batch=batch), T4, budget)
        figures = _figures(step.planned)
        rows.append(
            {
                "base": base,
                "batch": batch,
                "budget_gib": budget,
                "plan": str(step.plan),
                "recomputed_percent": round(100 * step.plan.share, 1),
                "of_budget_percent": round(100 * step.planned.needed_bytes / GIB / budget, 2),
                **figures,
            }
        )
        print(rows[-1], flush=True)
    return rows
