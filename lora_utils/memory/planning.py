"""What a run will need, before anything is downloaded: memory, disk and time of every stage, and what to recompute.

Peaks are counted on the models' own graphs (``steps``, ``footprints``) and kept on disk; times are a roofline of the
card (``cards``). Host memory and disk are sums over files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_utils.architectures import Architecture, find_architecture
from lora_utils.cards import Card, half_precision
from lora_utils.footprints import Footprint, Size
from lora_utils.memory import GIB
from lora_utils.recompute import Plan, Price, Prices, choose, full_plan, none_plan
from lora_utils.remember import remembered
from lora_utils.schema import RunConfig
from lora_utils.stage_forecasts import (
    Setting,
    StageForecast,
    captions_forecast,
    comparison_forecast,
    images_forecast,
    save_forecast,
    training_forecast,
)
from lora_utils.steps import TrainingStep, training_footprint

LARGEST_BATCH = 64
OFF_BY = 0.03
TRIES, CLOSE, AIM = 4, 0.98, 0.99


@dataclass(frozen=True)
class Forecast:
    """What a run needs on a card."""

    card: Card
    precision: Literal["fp32", "fp16", "bf16"]
    stages: dict[str, StageForecast]
    """By name, in order: captions, images, train, save, compare."""
    plan: Plan
    """What training recomputes."""
    prices: Prices
    """What it could recompute."""
    budget_gib: float
    """What training may reserve."""
    assumes_sdxl: bool
    """The base model's shapes are not here yet, and SDXL's own are taken."""
    is_counted: bool
    """False where this torch cannot simulate, and a rule of thumb has to do: 10 % off."""


@dataclass(frozen=True)
class PlannedStep:
    """A training step and what it recomputes to stay within a budget."""

    plain: Footprint
    """With nothing recomputed."""
    planned: Footprint
    prices: Prices
    plan: Plan


def forecast(config: RunConfig, card: Card, shapes: Mapping[Size, int] | None = None) -> Forecast:
    """What every stage of a run needs on a card. Downloads nothing.

    Args:
        config: Of the run.
        card: From ``cards.card`` or ``cards.card_at_hand``.
        shapes: How many examples there are of each width and height in pixels; one of the resolution when not given.
    """
    shapes = shapes or {config.data.resolution: 1}
    shape = find_architecture(config.model, config.paths.cache_dir)
    step = training_step(config, card, shape, max(shapes, key=math.prod))
    budget = config.train.vram_gib or card.usable_gib
    found = plan_step(step, card, budget, config.train.gradient_checkpointing, config.paths.cache_dir)
    setting = Setting(config, card, shape, step, shapes)
    stages = [
        captions_forecast(setting),
        images_forecast(setting),
        training_forecast(setting, found.planned),
        save_forecast(setting, found.planned),
        comparison_forecast(setting, found.plain),
    ]
    by_name = {stage.name: stage for stage in stages}
    counted = found.plain.is_counted
    return Forecast(card, step.precision, by_name, found.plan, found.prices, budget, shape.is_assumed, counted)


def plan_step(
    step: TrainingStep,
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
    plain = remembered(training_footprint, step, folder=folder)
    prices = _prices(plain, card)
    budget = budget_gib * GIB
    if checkpointing == "none" or (checkpointing == "auto" and plain.needed_bytes <= budget):
        return PlannedStep(plain, plain, prices, none_plan(prices))

    def count(plan: Plan) -> PlannedStep:
        found = remembered(training_footprint, replace(step, plan=Plan(plan.units, plan.label)), folder=folder)
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
    """
    folder, shape = config.paths.cache_dir, find_architecture(config.model, config.paths.cache_dir)
    step = training_step(config, card, shape, max(shapes or {config.data.resolution: 1}, key=math.prod))
    label = "full" if config.train.gradient_checkpointing == "full" else "none"

    def counted(batch: int) -> Footprint:
        whole = replace(step, batch=batch, plan=Plan((), label))
        return remembered(training_footprint, whole, folder=folder)

    budget, one, two = (config.train.vram_gib or card.usable_gib) * GIB, counted(1), counted(2)
    room = budget - one.needed_bytes
    batch = 1 + math.floor(room / (two.peak_bytes - one.peak_bytes))
    for _ in range(TRIES):  # the allocator's share is not quite linear
        if batch <= 2 or (needed := counted(batch).needed_bytes) <= budget:
            break
        batch = min(batch - 1, 1 + math.floor((batch - 1) * room / (needed - one.needed_bytes)))
    return max(0, min(batch, LARGEST_BATCH))


def replan(forecast: Forecast, measured_bytes: int, budget_gib: float | None = None) -> Plan | None:
    """Another plan after the first real step, if that was more than 3 % off; None where the plan can stay.

    Args:
        forecast: What was expected.
        measured_bytes: Most that tensors really took.
        budget_gib: What may be reserved; the forecast's when not given.
    """
    expected = forecast.plan.predicted_bytes
    if not forecast.prices.units or abs(measured_bytes / expected - 1) <= OFF_BY:
        return None
    stage = forecast.stages["train"]
    overhead = max(0.0, stage.reserved_gib - stage.allocated_gib) * GIB
    budget = (budget_gib or forecast.budget_gib) * GIB
    found = choose(forecast.prices, budget - overhead - (measured_bytes - expected))
    return None if found == forecast.plan else found


def training_step(config: RunConfig, card: Card, shape: Architecture, size_px: Size) -> TrainingStep:
    """The micro-batch that the settings ask for, with nothing recomputed."""
    base, train = config.model.base_precision, config.train
    return TrainingStep(
        shape.unet,
        config.lora,
        precision_for(card, config.model.mixed_precision),
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


def precision_for(card: Card, wanted: str) -> Literal["fp32", "fp16", "bf16"]:
    """What mixed_precision auto stands for on a card: bf16 from sm_80, fp16 below, fp32 on a CPU."""
    if wanted in ("fp32", "fp16", "bf16"):
        return wanted
    if card.compute_capability is None:
        return "fp32"
    return half_precision(card.compute_capability)


def _prices(found: Footprint, card: Card) -> Prices:
    units = [
        Price(name, kind, unit.freed_bytes, card.seconds(unit.work.flops, unit.work.streamed_bytes, unit.work.kernels))
        for name, (kind, unit) in found.units.items()
    ]
    return Prices(found.peak_bytes, tuple(units))
