"""Whether a run will fit a card: every stage's forecast, judged, with what would help where it is tight."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_utils.config.schema import RunConfig
from lora_utils.memory.cards import Card
from lora_utils.memory.footprint import Footprint
from lora_utils.memory.forecast import Forecast, forecasting
from lora_utils.memory.gradient_checkpointing import Plan
from lora_utils.memory.planning import count_recomputed, largest_batch, plan_step, step_shape
from lora_utils.memory.stage_forecasts import StageForecast
from lora_utils.model.architectures import find_architecture
from lora_utils.system.steps import Steps, finished
from lora_utils.system.units import GIB

# Of what can be used, a stage passes with either. Reserved blocks alone would be too strict: torch gives
# empty ones back when the card is full.
TIGHT_FROM = 0.93  # by reserved blocks
EASY_TO = 0.75  # by tensors alone
SMALLEST_SIDE_PX = 512  # of a resolution that is advised
SIDE_STEP_PX = 64  # as of buckets
Judgement = Literal["PASS", "TIGHT", "FAIL"]


@dataclass(frozen=True)
class Suggestion:
    """A setting that would make training smaller, or spare recomputation."""

    setting: str
    """As it is written: name=value."""
    reserved_gib: float
    """What a step takes from the card then."""
    saves_gib: float
    plan: Plan
    """What is still recomputed."""

    def __str__(self) -> str:
        return f"{self.setting}: {self.reserved_gib:.1f} GiB, {self.saves_gib:.1f} less; {self.plan}"


@dataclass(frozen=True)
class JudgedForecast:
    """A judged forecast; prints as a table."""

    forecast: Forecast
    judgements: dict[str, Judgement]
    """By stage."""
    suggestions: list[Suggestion]
    """Where training is not a PASS, best first."""
    largest_batch: int
    """Largest train_batch_size that fits without recomputing."""
    train_batch_size: int
    """What the settings say."""
    steps: int | None
    """Of the whole run; None while the examples are not counted."""

    def __str__(self) -> str:
        forecast = self.forecast
        lines = [forecast.card.headline(forecast.budget_gib, forecast.assumes_sdxl)]
        for stage in forecast.stages.values():
            lines.append(_line(stage, self.judgements[stage.name], self.steps))
        lines += _plan_lines(forecast, self.largest_batch, self.train_batch_size)
        lines += [f"with {suggestion}" for suggestion in self.suggestions]
        return "\n".join([*lines, self._needs()])

    @property
    def has_failed(self) -> bool:
        """Some stage will not fit."""
        return "FAIL" in self.judgements.values()

    @property
    def ram_gib(self) -> float:
        """Host memory of the stage that needs most."""
        return max(stage.host_ram_gib for stage in self.forecast.stages.values())

    @property
    def disk_gib(self) -> float:
        """Downloads, cache and results of all stages."""
        return sum(stage.disk_gib for stage in self.forecast.stages.values())

    def _needs(self) -> str:
        how = (
            "by rates measured here"
            if self.forecast.card.is_measured
            else "estimates by a roofline, not measured"
        )
        return f"needs {self.ram_gib:.1f} GiB of RAM and {self.disk_gib:.1f} GiB of disk; times are {how}"


def judge_run(config: RunConfig, card: Card, examples: int | None = None) -> JudgedForecast:
    """Forecast a run on a card, judge each stage, and try what would help. Downloads nothing.

    Args:
        config: All settings; every stage is judged.
        card: From ``cards.find_card`` or ``cards.card_here``.
        examples: How many there are, where that is known.

    Raises:
        SimulationError: This version of torch cannot be simulated.
    """
    return finished(judging(config, card, examples))


def judging(
    config: RunConfig, card: Card, examples: int | None = None
) -> Generator[str, None, JudgedForecast]:
    """As ``judge_run``; yields the lines below the headline as they are known, and what is being tried."""
    steps = config.train.max_train_steps
    if steps is None and examples:
        steps = config.train.total_steps(examples)
    budget = config.train.vram_gib or card.usable_gib
    judgements: dict[str, Judgement] = {}
    stages = Steps(forecasting(config, card, {config.data.resolution: examples or 1}))
    for stage in stages:
        judgements[stage.name] = _judge(stage, budget)
        yield _line(stage, judgements[stage.name], steps)

    run = stages.result
    largest = largest_batch(config, card)
    yield from _plan_lines(run, largest, config.train.train_batch_size)
    suggestions: list[Suggestion] = []
    if judgements["train"] != "PASS":
        trials = Steps(suggesting(config, run))
        yield from trials
        suggestions = trials.result
    judged = JudgedForecast(run, judgements, suggestions, largest, config.train.train_batch_size, steps)
    yield from str(judged).splitlines()[-1 - len(suggestions) :]
    return judged


def _line(stage: StageForecast, judgement: Judgement, steps: int | None) -> str:
    takes = f"{stage.seconds:.2g} s per {stage.per}" if stage.seconds else ""
    if stage.name == "train" and steps:
        takes += f", {steps * stage.seconds / 60:.0f} min for {steps} steps"
    return f"{judgement:5} {stage.name:9} {stage.reserved_gib:5.1f} GiB   {takes}".rstrip()


def _plan_lines(run: Forecast, largest: int, train_batch_size: int) -> list[str]:
    line = f"training: {run.plan}; "
    if largest > train_batch_size:
        how = "" if run.plan.label == "full" else " without recomputing"
        line += f"train_batch_size up to {largest} would fit{how}"
    else:
        line += f"train_batch_size is {train_batch_size}"
    return [line, f"base_precision: {run.left_in_full}"] if run.left_in_full else [line]


def suggest(config: RunConfig, current: Forecast) -> list[Suggestion]:
    """Settings that would make a forecast step smaller, best first, each forecast itself.

    Args:
        config: All settings as they are.
        current: What was forecast with them.
    """
    return finished(suggesting(config, current))


def suggesting(config: RunConfig, current: Forecast) -> Generator[str, None, list[Suggestion]]:
    """As ``suggest``; yields a line before each setting that is tried, since each takes seconds."""
    reserved_gib = current.stages["train"].reserved_gib
    suggestions = []
    candidates = _candidates(config)
    for number, (setting, section, changes) in enumerate(candidates, start=1):
        yield f"      trying {setting} ({number} of {len(candidates)})"
        # A copy with one section changed: candidates are made of values that the schema allows.
        changed_section = getattr(config, section).model_copy(update=changes)
        footprint, plan = _changed_step(config.model_copy(update={section: changed_section}), current)

        needed_gib = footprint.needed_bytes / GIB
        needs_gib = max(needed_gib, min(footprint.reserved_bytes / GIB, current.budget_gib))
        if needs_gib < reserved_gib or plan.share < current.plan.share:
            suggestions.append(Suggestion(setting, needs_gib, reserved_gib - needs_gib, plan))
    return sorted(suggestions, key=lambda suggestion: (suggestion.plan.share, suggestion.reserved_gib))


def _changed_step(config: RunConfig, current: Forecast) -> tuple[Footprint, Plan]:
    """What a step takes with other settings, and what it recomputes then."""
    folder = config.paths.cache_dir
    architecture = find_architecture(config.model, folder)
    shape = step_shape(config, current.precision, architecture, config.data.resolution)
    checkpointing = config.train.gradient_checkpointing
    # Where even everything recomputed is too much, few changes leave room for a better plan: the least is
    # counted first, and often is all that is needed.
    if current.plan.label == "full" and shape.base == "plain" and checkpointing == "auto":
        least = count_recomputed(shape, folder)
        if least.needed_bytes > current.budget_gib * GIB:
            return least, Plan((), "full", least.peak_bytes, 1.0)
    step = plan_step(shape, current.card, current.budget_gib, checkpointing, folder)
    return step.planned, step.plan


def _judge(stage: StageForecast, budget_gib: float) -> Judgement:
    if stage.reserved_gib <= TIGHT_FROM * budget_gib or stage.allocated_gib <= EASY_TO * budget_gib:
        return "PASS"
    return "TIGHT" if stage.reserved_gib <= budget_gib else "FAIL"


def _candidates(config: RunConfig) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Settings to try: how to write them, section, values."""
    train = config.train
    candidates: list[tuple[str, str, Mapping[str, Any]]] = []
    if train.gradient_checkpointing == "none":
        candidates.append(("gradient_checkpointing=auto", "train", {"gradient_checkpointing": "auto"}))
    if not train.lean_step and not train.torch_compile and not config.lora.use_dora:
        candidates.append(("lean_step=true", "train", {"lean_step": True}))

    if train.train_batch_size > 1:
        # The same number of examples in every update, so that the run learns as it would have.
        accumulation = train.gradient_accumulation_steps * train.train_batch_size
        changes = {"train_batch_size": 1, "gradient_accumulation_steps": accumulation}
        setting = f"train_batch_size=1 with gradient_accumulation_steps={accumulation}"
        candidates.append((setting, "train", changes))

    if config.model.base_precision in ("auto", "fp16"):
        candidates.append(("base_precision=nf4", "model", {"base_precision": "nf4"}))
    if train.optimizer in ("adamw", "prodigy") and not train.use_8bit_adam:
        candidates.append(("optimizer=adamw8bit", "train", {"optimizer": "adamw8bit"}))

    # Three quarters of each side, down to a bucket's.
    width, height = (side * 3 // 4 // SIDE_STEP_PX * SIDE_STEP_PX for side in config.data.resolution)
    if min(width, height) >= SMALLEST_SIDE_PX:
        setting = f"resolution={width}" if width == height else f"resolution={width}x{height}"
        candidates.append((setting, "data", {"resolution": (width, height)}))
    return candidates
