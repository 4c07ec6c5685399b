"""Which trials there are to be, phase by phase, each given what earlier ones found."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from statistics import mean
from typing import Any, get_args

from benchmarks.targets.trials import Trial
from benchmarks.targets.ways import LOSER, WAYS, WINNER, Way
from lora_utils.tiny.demo_data import Content

STEPS = 300
SEEDS = (0, 1, 2)
TUNING_SEED = 100
"""Not one of the table's, so that no way is tuned to its own figures."""
TUNED_ON: tuple[Content, ...] = ("ink", "momo")
"""A style and the subject; the second style is judged with what these two chose."""
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
ALPHA_RATIOS = (0.5, 2.0)
"""Beside 1, at the best learning rate."""
CONTENTS: tuple[Content, ...] = get_args(Content)
EQUAL = 0.03
"""Share of the steps by which equal cost may differ from equal steps without trials of its own."""
RECIPE = {
    "caption_dropout_rate": (0.0, 0.1, 0.5),
    "rank": (4, 32),
    "steps": (STEPS // 2, 2 * STEPS),
}
"""What is varied beside the table's values, one at a time, for the way that learns best."""

Results = Mapping[str, Mapping[str, Any]]
"""Of finished trials, by their key."""


def phases() -> Iterator[tuple[str, Callable[[Results], list[Trial]]]]:
    """Name of each phase, and its trials; a phase may be asked for once all before it are done."""
    yield "learning rates", lambda results: [trial for way in WAYS for trial in rates_of(way)]
    yield "alphas", lambda results: [trial for way in WAYS for trial in alphas_of(way, results)]
    yield "equal steps", lambda results: [trial for way in WAYS for trial in table_of(way, results)]
    yield "equal cost", lambda results: [trial for way in WAYS for trial in equal_cost_of(way, results)]
    yield "controls", controls
    yield "recipe", recipe


def rates_of(way: Way) -> list[Trial]:
    """Short of pictures: one trial for each learning rate and each of ``TUNED_ON``."""
    return [
        Trial(way.name, content, TUNING_SEED, STEPS, rate, is_judged=False)
        for rate in LEARNING_RATES
        for content in TUNED_ON
    ]


def alphas_of(way: Way, results: Results) -> list[Trial]:
    """Other alphas at the learning rate that was best."""
    best = _best(rates_of(way), results)
    return [
        replace(best, content=content, alpha_ratio=ratio) for ratio in ALPHA_RATIOS for content in TUNED_ON
    ]


def tuned(way: Way, results: Results) -> Trial:
    """The best of a way's tuning trials: the lowest mean of held-out losses, as shares of the base's."""
    return _best([*rates_of(way), *alphas_of(way, results)], results)


def table_of(way: Way, results: Results, steps: int = STEPS) -> list[Trial]:
    """Every content and seed, judged."""
    best = replace(tuned(way, results), is_judged=True, steps=steps)
    return [replace(best, content=content, seed=seed) for content in CONTENTS for seed in SEEDS]


def equal_cost_of(way: Way, results: Results) -> list[Trial]:
    """So many steps as take the CPU seconds of the first way's."""
    cost, first_cost = (
        mean(results[trial.key]["cpu_seconds"] for trial in table_of(each, results))
        for each in (way, WAYS[0])
    )
    steps = round(STEPS * first_cost / cost / 10) * 10
    return table_of(way, results, STEPS if abs(steps / STEPS - 1) <= EQUAL else steps)


def controls(results: Results) -> list[Trial]:
    """One that must lose, and one that must win."""
    best = replace(tuned(WAYS[2], results), is_judged=True)
    trials = [
        replace(best, way=WINNER.name, steps=4 * STEPS),
        replace(tuned(WAYS[0], results), way=LOSER.name, is_judged=True),
    ]
    return [replace(trial, content=content, seed=0) for trial in trials for content in CONTENTS]


def recipe(results: Results) -> list[Trial]:
    """Variations of the way that learns best, one setting at a time."""
    best_way = max(WAYS, key=lambda way: success(table_of(way, results), results))
    trials = []
    for name, values in RECIPE.items():
        for value in values:
            for trial in table_of(best_way, results):
                if trial.seed != SEEDS[-1] and trial.content in TUNED_ON:
                    trials.append(replace(trial, **{name: value}))
    return trials


def success(trials: Iterable[Trial], results: Results) -> float:
    """Mean over trials of the share that shows what was to be learned, from 0 to 1."""
    return mean(
        results[trial.key]["shows_subject" if trial.content == "momo" else "in_style"] for trial in trials
    )


def _best(trials: list[Trial], results: Results) -> Trial:
    groups: dict[tuple[float, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.learning_rate, trial.alpha_ratio), []).append(trial)

    def loss(group: list[Trial]) -> float:
        figures = [results[trial.key] for trial in group]
        return mean(each["held_out_loss"] / each["held_out_loss_before"] for each in figures)

    return min(groups.values(), key=loss)[0]
