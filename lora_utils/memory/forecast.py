"""What a run needs, before anything is loaded; ``stage_forecasts`` has its stages one by one."""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

from lora_utils.config.schema import RunConfig
from lora_utils.config.section import Size
from lora_utils.memory.cards import Card
from lora_utils.memory.gradient_checkpointing import Plan, Prices, choose
from lora_utils.memory.planning import plan_step, step_shape
from lora_utils.memory.stage_forecasts import (
    StageContext,
    StageForecast,
    captions_forecast,
    comparison_forecast,
    held_out_forecast,
    images_forecast,
    save_forecast,
    training_forecast,
    workspace_bytes,
)
from lora_utils.model.architectures import find_architecture
from lora_utils.model.quantisation import LeftInFull
from lora_utils.system.device import Precision, choose_precision
from lora_utils.system.steps import finished
from lora_utils.system.units import GIB

OFF_BY = 0.03  # how far a forecast may be from the first real step before training plans anew


@dataclass(frozen=True)
class Forecast:
    """What a run needs on a card."""

    card: Card
    precision: Precision
    """What the U-Net and the text encoders compute in."""
    stages: dict[str, StageForecast]
    """By name, in order: captions, images, train, held-out where there is any, save, compare."""
    plan: Plan
    """What training recomputes."""
    prices: Prices
    """What it could recompute."""
    budget_gib: float
    """What training may reserve."""
    assumes_sdxl: bool
    """The base model's shapes are not here yet, and SDXL's own are taken."""
    left_in_full: LeftInFull | None = None
    """What of the U-Net stays in full although it was to be quantised."""


def forecast(
    config: RunConfig,
    card: Card,
    sizes: Mapping[Size, int] | None = None,
    precision: Precision | None = None,
) -> Forecast:
    """What every stage of a run needs on a card. Downloads nothing.

    Args:
        config: All settings; every stage is forecast.
        card: From ``cards.find_card`` or ``cards.card_here``.
        sizes: How many examples there are of each width and height in pixels; one of the resolution when not
            given.
        precision: What the U-Net computes in; what the settings and the card say when not given.

    Raises:
        SimulationError: This version of torch cannot be simulated.
    """
    return finished(forecasting(config, card, sizes, precision))


def forecasting(
    config: RunConfig,
    card: Card,
    sizes: Mapping[Size, int] | None = None,
    precision: Precision | None = None,
) -> Generator[StageForecast, None, Forecast]:
    """As ``forecast``; yields each stage as soon as it is known, since the step of training takes seconds."""
    sizes = sizes or {config.data.resolution: 1}
    architecture = find_architecture(config.model, config.paths.cache_dir)
    if precision is None:
        precision = choose_precision(config.model.mixed_precision, card.compute_capability)

    # Of the largest examples: a step that fits them fits all others.
    shape = step_shape(config, precision, architecture, max(sizes, key=math.prod))
    context = StageContext(config, card, architecture, shape, sizes)
    stages = [captions_forecast(context)]
    yield stages[-1]
    stages.append(images_forecast(context))
    yield stages[-1]

    budget = config.train.vram_gib or card.usable_gib
    shape = replace(shape, workspace_bytes=workspace_bytes(context))
    step = plan_step(shape, card, budget, config.train.gradient_checkpointing, config.paths.cache_dir)
    stages.append(training_forecast(context, step.planned))
    yield stages[-1]
    if config.data.validation_split:
        stages.append(held_out_forecast(context, step.plain))
        yield stages[-1]
    stages.append(save_forecast(context, step.planned))
    yield stages[-1]
    stages.append(comparison_forecast(context, step.plain))
    yield stages[-1]
    by_name = {stage.name: stage for stage in stages}
    in_full = step.plain.left_in_full
    return Forecast(
        card, precision, by_name, step.plan, step.prices, budget, architecture.is_assumed, in_full
    )


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

    # The allocator's share was forecast and not measured; by what tensors were off, the new plan is to be as
    # well.
    stage = forecast.stages["train"]
    overhead = max(0.0, stage.reserved_gib - stage.allocated_gib) * GIB
    budget = (budget_gib or forecast.budget_gib) * GIB
    plan = choose(forecast.prices, budget - overhead - (measured_bytes - expected))
    # Prices are of single modules, and add up to a little more or less than the plan that was forecast whole:
    # that is no reason to recompute more after a step that took less, or less after one that took more.
    change = plan.share - forecast.plan.share
    is_due = change > 0 if measured_bytes > expected else change < 0
    return plan if is_due else None
