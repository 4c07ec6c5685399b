"""What a training step recomputes to stay within a budget, and the largest batch that does without.

Peaks are counted on the model's own graph (``unet_footprint``) and kept on disk; times are a roofline of the
card (``cards``).
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
from lora_utils.memory.step_shape import StepShape
from lora_utils.model.architectures import Architecture, find_architecture
from lora_utils.system.device import Precision, choose_precision
from lora_utils.system.units import GIB

LARGEST_BATCH = 64
TRIES = 4  # simulations of SDXL's step, of seconds each
CLOSE = 0.98  # of the budget: a plan that uses as much is good enough
AIM = 0.99  # of the budget: what plans are made for, so that the next count does not miss it by a hair


@dataclass(frozen=True)
class PlannedStep:
    """A training step and what it recomputes to stay within a budget."""

    plain: Footprint
    """With nothing recomputed."""
    planned: Footprint
    """With the plan."""
    prices: Prices
    plan: Plan


def plan_step(
    shape: StepShape,
    card: Card,
    budget_gib: float,
    checkpointing: Literal["auto", "none", "full"] = "auto",
    folder: Path | None = None,
) -> PlannedStep:
    """Choose what to recompute, and count the step again with it.

    Args:
        shape: Of the step, with nothing recomputed.
        card: Whose rates price recomputation.
        budget_gib: What torch may take.
        checkpointing: auto recomputes what does not fit.
        folder: Where footprints are kept; ~/.cache when not given.
    """
    plain = cached_on_disk(training_footprint, shape, folder=folder)
    prices = _prices(plain, card)
    budget = budget_gib * GIB
    if checkpointing == "none" or (checkpointing == "auto" and plain.needed_bytes <= budget):
        return PlannedStep(plain, plain, prices, none_plan(prices))

    def count(plan: Plan) -> PlannedStep:
        # Units and label alone: the plan is part of the file's name, and its figures differ from card to
        # card.
        recomputing = replace(shape, plan=Plan(plan.units, plan.label))
        planned = cached_on_disk(training_footprint, recomputing, folder=folder)
        return PlannedStep(plain, planned, prices, replace(plan, predicted_bytes=planned.peak_bytes))

    if checkpointing == "full" or not plain.units:
        return count(full_plan(prices))

    # Plans are chosen by what tensors take; the allocator's share on top is known only once a plan is
    # counted.
    tried: dict[Plan, PlannedStep] = {}
    overhead = plain.needed_bytes - plain.peak_bytes
    for _ in range(TRIES):
        plan = choose(prices, AIM * budget - overhead)
        if plan in tried:
            break
        tried[plan] = count(plan)
        needed = tried[plan].planned.needed_bytes
        if plan.label == "full" or CLOSE * budget <= needed <= budget:
            break
        overhead += needed - AIM * budget

    fitting = [step for step in tried.values() if step.planned.needed_bytes <= budget]
    if not fitting:
        return count(full_plan(prices))
    return min(fitting, key=lambda step: step.plan.share)


def count_recomputed(shape: StepShape, folder: Path | None = None) -> Footprint:
    """A step with everything recomputed: the least that it can take, and one count instead of several."""
    return cached_on_disk(training_footprint, replace(shape, plan=Plan((), "full")), folder=folder)


def training_footprint(shape: StepShape) -> Footprint:
    """As ``unet_footprint``'s, which loads diffusers and peft: for a step that was not counted before."""
    from lora_utils.memory import unet_footprint

    return unet_footprint.training_footprint(shape)


def largest_batch(config: RunConfig, card: Card, sizes: Mapping[Size, int] | None = None) -> int:
    """The largest train_batch_size that fits; without recomputation, unless gradient_checkpointing is full.

    Few simulations do: what a step needs grows linearly with its batch. 0 when not even one fits, at most 64.

    Args:
        config: What a step is made of.
        card: Whose memory is the budget, where vram_gib does not say.
        sizes: How many examples there are of each width and height in pixels; the resolution when not given.

    Raises:
        SimulationError: This version of torch cannot be simulated.
    """
    folder = config.paths.cache_dir
    architecture = find_architecture(config.model, folder)
    precision = choose_precision(config.model.mixed_precision, card.compute_capability)
    largest_size = max(sizes or {config.data.resolution: 1}, key=math.prod)
    shape = step_shape(config, precision, architecture, largest_size)
    label = "full" if config.train.gradient_checkpointing == "full" else "none"

    def count(batch: int) -> Footprint:
        batched = replace(shape, batch=batch, plan=Plan((), label))
        return cached_on_disk(training_footprint, batched, folder=folder)

    # Along a line from one example upwards, whose slope is what a second one adds to the tensors.
    budget = (config.train.vram_gib or card.usable_gib) * GIB
    single = count(1)
    room = budget - single.needed_bytes
    if room < 0:
        return 0
    double = count(2)
    # Never beyond what is told: on a CPU the room differs from call to call, and so would the counted batch.
    batch = min(LARGEST_BATCH, 1 + math.floor(room / (double.peak_bytes - single.peak_bytes)))

    # Counted itself, the batch can need more than the line says, for the allocator's share is not quite
    # linear.
    for _ in range(TRIES):
        if batch <= 2:
            break
        needed = count(batch).needed_bytes
        if needed <= budget:
            break
        steeper = 1 + math.floor((batch - 1) * room / (needed - single.needed_bytes))
        batch = min(batch - 1, steeper)
    return batch


def step_shape(
    config: RunConfig, precision: Precision, architecture: Architecture, size_px: Size
) -> StepShape:
    """The micro-batch that the settings ask for, with nothing recomputed."""
    train = config.train
    base = config.model.base_precision
    return StepShape(
        architecture.unet,
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
        scale_factor=architecture.scale_factor,
    )


def _prices(footprint: Footprint, card: Card) -> Prices:
    units = []
    for name, (module_class, unit) in footprint.units.items():
        seconds = card.seconds(unit.work.flops, unit.work.streamed_bytes, unit.work.kernels)
        units.append(Price(name, module_class, unit.freed_bytes, seconds))
    return Prices(footprint.peak_bytes, tuple(units))
