"""Whether a run will fit a card: the forecast of every stage, judged, with what would help where it is tight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_utils.config.schema import RunConfig
from lora_utils.memory.cards import Card
from lora_utils.memory.forecast import Forecast, StageForecast, forecast
from lora_utils.memory.gradient_checkpointing import Plan
from lora_utils.memory.planning import largest_batch, plan_step, step_shape
from lora_utils.model.architectures import find_architecture
from lora_utils.system.device import GIB

TIGHT_FROM, EASY_TO = 0.93, 0.75  # of what can be used: by reserved blocks, by tensors alone
Judgement = Literal["PASS", "TIGHT", "FAIL"]


@dataclass(frozen=True)
class Suggestion:
    """A setting that would make training smaller, or spare recomputation."""

    setting: str
    reserved_gib: float
    saves_gib: float
    plan: Plan

    def __str__(self) -> str:
        return f"{self.setting}: {self.reserved_gib:.1f} GiB, {self.saves_gib:.1f} less; {self.plan}"


@dataclass(frozen=True)
class JudgedForecast:
    """A judged forecast; prints as a table."""

    forecast: Forecast
    judgements: dict[str, Judgement]
    """By stage."""
    helps: list[Suggestion]
    """Where training is not a PASS, best first."""
    largest_batch: int
    """Largest train_batch_size that fits without recomputing."""
    train_batch_size: int
    steps: int | None
    """Of the whole run; None while the examples are not counted."""

    def __str__(self) -> str:
        found, card = self.forecast, self.forecast.card
        shapes = (
            "; SDXL's own shapes are taken, the base model's config is not here yet"
            if found.assumes_sdxl
            else ""
        )
        lines = [f"{card.name}: {found.budget_gib:.1f} of {card.total_gib:.1f} GiB can be used{shapes}"]
        lines += [self._line(stage) for stage in found.stages.values()]
        lines.append(f"training: {found.plan}; {self._batches()}")
        lines += [f"with {help}" for help in self.helps]
        how = "by rates measured here" if card.is_measured else "estimates by a roofline, not measured"
        lines.append(
            f"needs {self.ram_gib:.1f} GiB of RAM and {self.disk_gib:.1f} GiB of disk; times are {how}"
        )
        return "\n".join(lines)

    @property
    def ram_gib(self) -> float:
        """Host memory of the stage that needs most."""
        return max(stage.host_ram_gib for stage in self.forecast.stages.values())

    @property
    def disk_gib(self) -> float:
        """Downloads, cache and results of all stages."""
        return sum(stage.disk_gib for stage in self.forecast.stages.values())

    def _line(self, stage: StageForecast) -> str:
        takes = f"{stage.seconds:.2g} s per {stage.per}" if stage.seconds else ""
        if stage.name == "train" and self.steps:
            takes += f", {self.steps * stage.seconds / 60:.0f} min for {self.steps} steps"
        return (
            f"{self.judgements[stage.name]:5} {stage.name:9} {stage.reserved_gib:5.1f} GiB   {takes}".rstrip()
        )

    def _batches(self) -> str:
        if self.largest_batch > self.train_batch_size:
            how = "" if self.forecast.plan.label == "full" else " without recomputing"
            return f"train_batch_size up to {self.largest_batch} would fit{how}"
        return f"train_batch_size is {self.train_batch_size}"


def judge_run(config: RunConfig, card: Card, examples: int | None = None) -> JudgedForecast:
    """Forecast a run on a card, judge each stage, and try what would help. Downloads nothing.

    Args:
        config: Of the run.
        card: From ``cards.card`` or ``cards.card_at_hand``.
        examples: How many there are, where that is known.

    Raises:
        SimulationError: This version of torch cannot be simulated.
    """
    found = forecast(config, card, {config.data.resolution: examples or 1})
    judgements: dict[str, Judgement] = {
        name: _judge(stage, found.budget_gib) for name, stage in found.stages.items()
    }
    helps = [] if judgements["train"] == "PASS" else suggest(config, found)
    steps = config.train.max_train_steps or (config.train.total_steps(examples) if examples else None)
    largest = largest_batch(config, card)
    return JudgedForecast(found, judgements, helps, largest, config.train.train_batch_size, steps)


def _judge(stage: StageForecast, budget_gib: float) -> Judgement:
    if stage.reserved_gib <= TIGHT_FROM * budget_gib or stage.allocated_gib <= EASY_TO * budget_gib:
        return "PASS"
    return "TIGHT" if stage.reserved_gib <= budget_gib else "FAIL"


def suggest(config: RunConfig, found: Forecast) -> list[Suggestion]:
    """Settings that would make a forecast step smaller, best first, each forecast itself."""
    shape = find_architecture(config.model, config.paths.cache_dir)
    before, helps = found.stages["train"].reserved_gib, []
    for setting, section, changes in _candidates(config):
        part = getattr(config, section).model_copy(update=changes)
        other = config.model_copy(update={section: part})
        step = step_shape(other, found.precision, shape, other.data.resolution)
        checkpointing = other.train.gradient_checkpointing
        planned = plan_step(step, found.card, found.budget_gib, checkpointing, config.paths.cache_dir)
        footprint = planned.planned
        needs = max(footprint.needed_bytes / GIB, min(footprint.reserved_bytes / GIB, found.budget_gib))
        if needs < before or planned.plan.share < found.plan.share:
            helps.append(Suggestion(setting, needs, before - needs, planned.plan))
    return sorted(helps, key=lambda help: (help.plan.share, help.reserved_gib))


def _candidates(config: RunConfig) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Settings to try: how to write them, section, values."""
    train, tried = config.train, []
    if train.gradient_checkpointing == "none":
        tried.append(("gradient_checkpointing=auto", "train", {"gradient_checkpointing": "auto"}))
    if not train.lean_step and not train.torch_compile and not config.lora.use_dora:
        tried.append(("lean_step=true", "train", {"lean_step": True}))
    if train.train_batch_size > 1:
        accumulation = train.gradient_accumulation_steps * train.train_batch_size
        text = f"train_batch_size=1 with gradient_accumulation_steps={accumulation}"
        tried.append((text, "train", {"train_batch_size": 1, "gradient_accumulation_steps": accumulation}))
    if config.model.base_precision in ("auto", "fp16"):
        tried.append(("base_precision=nf4", "model", {"base_precision": "nf4"}))
    if train.optimizer in ("adamw", "prodigy") and not train.use_8bit_adam:
        tried.append(("optimizer=adamw8bit", "train", {"optimizer": "adamw8bit"}))
    smaller = tuple(side * 3 // 4 // 64 * 64 for side in config.data.resolution)
    if min(smaller) >= 512:
        text = (
            f"resolution={smaller[0]}"
            if smaller[0] == smaller[1]
            else f"resolution={smaller[0]}x{smaller[1]}"
        )
        tried.append((text, "data", {"resolution": smaller}))
    return tried
