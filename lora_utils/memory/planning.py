"""What a run will need, before anything is downloaded: memory, disk and time of every stage, and what to recompute.

Peaks are counted on the models' own graphs (``steps``, ``footprints``) and kept on disk; times are a roofline of the
card (``cards``). Host memory and disk are sums over files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_utils.config.schema import RunConfig
from lora_utils.config.section import Size
from lora_utils.memory.cards import Card
from lora_utils.memory.footprint import Footprint, cached_on_disk
from lora_utils.memory.gradient_checkpointing import Plan, Price, Prices, choose, full_plan, none_plan
from lora_utils.memory.simulation import require_support
from lora_utils.memory.unet_footprint import StepShape, training_footprint
from lora_utils.model.architectures import Architecture, find_architecture
from lora_utils.system.device import GIB, Precision, choose_precision

LARGEST_BATCH = 64
TRIES, CLOSE, AIM = 4, 0.98, 0.99


@dataclass(frozen=True)
class PlannedStep:
    """A training step and what it recomputes to stay within a budget."""

    plain: Footprint
    """With nothing recomputed."""
    planned: Footprint
    prices: Prices
    plan: Plan


def plan_step(
    step: StepShape,
    card: Card,
    budget_gib: float,
    checkpointing: Literal["auto", "none", "full"] = "auto",
    folder: Path | None = None,
) -> PlannedStep:
    """Choose what to recompute, and count the step again with it.

    Args:
        step: With nothing recomputed.
        card: Whose rates price recomputation.
        budget_gib: What torch may take.
        checkpointing: auto recomputes what does not fit.
        folder: Where footprints are kept.
    """
    plain = cached_on_disk(training_footprint, step, folder=folder)
    prices = _prices(plain, card)
    budget = budget_gib * GIB
    if checkpointing == "none" or (checkpointing == "auto" and plain.needed_bytes <= budget):
        return PlannedStep(plain, plain, prices, none_plan(prices))

    def count(plan: Plan) -> PlannedStep:
        found = cached_on_disk(
            training_footprint, replace(step, plan=Plan(plan.units, plan.label)), folder=folder
        )
        return PlannedStep(plain, found, prices, replace(plan, predicted_bytes=found.peak_bytes))

    if checkpointing == "full" or not plain.units:
        return count(full_plan(prices))
    tried: dict[Plan, PlannedStep] = {}
    overhead = plain.needed_bytes - plain.peak_bytes
    for _ in range(TRIES):  # the allocator's share is known only once a plan is counted
        plan = choose(prices, AIM * budget - overhead)
        if plan in tried:
            break
        tried[plan] = count(plan)
        needed = tried[plan].planned.needed_bytes
        if plan.label == "full" or CLOSE * budget <= needed <= budget:
            break
        overhead += needed - AIM * budget
    fitting = [one for one in tried.values() if one.planned.needed_bytes <= budget]
    return min(fitting, key=lambda one: one.plan.share) if fitting else count(full_plan(prices))


def largest_batch(config: RunConfig, card: Card, shapes: Mapping[Size, int] | None = None) -> int:
    """The largest train_batch_size that fits; without recomputation, unless gradient_checkpointing is full.

    Few simulations do: what a step needs grows linearly with its batch. 0 when not even one fits, at most 64.

    Raises:
        SimulationError: This version of torch cannot be simulated.
    """
    require_support()
    folder, shape = config.paths.cache_dir, find_architecture(config.model, config.paths.cache_dir)
    precision = choose_precision(config.model.mixed_precision, card.compute_capability)
    step = step_shape(config, precision, shape, max(shapes or {config.data.resolution: 1}, key=math.prod))
    label = "full" if config.train.gradient_checkpointing == "full" else "none"

    def counted(batch: int) -> Footprint:
        whole = replace(step, batch=batch, plan=Plan((), label))
        return cached_on_disk(training_footprint, whole, folder=folder)

    budget, one, two = (config.train.vram_gib or card.usable_gib) * GIB, counted(1), counted(2)
    room = budget - one.needed_bytes
    batch = 1 + math.floor(room / (two.peak_bytes - one.peak_bytes))
    for _ in range(TRIES):  # the allocator's share is not quite linear
        if batch <= 2 or (needed := counted(batch).needed_bytes) <= budget:
            break
        batch = min(batch - 1, 1 + math.floor((batch - 1) * room / (needed - one.needed_bytes)))
    return max(0, min(batch, LARGEST_BATCH))


def step_shape(config: RunConfig, precision: Precision, shape: Architecture, size_px: Size) -> StepShape:
    """The micro-batch that the settings ask for, with nothing recomputed."""
    base, train = config.model.base_precision, config.train
    return StepShape(
        shape.unet,
        config.lora,
        precision.name,
        "plain" if base in ("auto", "fp16") else base,
        "adamw8bit" if train.use_8bit_adam else train.optimizer,
        train.train_batch_size,
        size_px,
        tokens=config.data.max_token_length // 75 * 75 + 2,
        is_lean=train.lean_step,
        accumulates=train.gradient_accumulation_steps > 1,
        has_average=train.use_ema,
        scale_factor=shape.scale_factor,
    )


def _prices(found: Footprint, card: Card) -> Prices:
    units = [
        Price(
            name,
            kind,
            unit.freed_bytes,
            card.seconds(unit.work.flops, unit.work.streamed_bytes, unit.work.kernels),
        )
        for name, (kind, unit) in found.units.items()
    ]
    return Prices(found.peak_bytes, tuple(units))
