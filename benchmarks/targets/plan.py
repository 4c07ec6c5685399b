"""Which trials there are to be, phase by phase, each given what earlier ones found."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from statistics import mean
from typing import Any, get_args

from benchmarks.targets.trials import Trial
from benchmarks.targets.ways import ATTENTION_WAY, FULL_WAY, LOSER, WAYS, Way
from lora_utils.tiny.demo_data import Content
from lora_utils.tiny.drawing import SUBJECT

STEPS = 200
SEEDS = (0, 1, 2)
TUNING_SEED = 100
"""Not one of the table's, so that no way is tuned to its own figures; held-out pictures are the same."""
TUNED_ON: tuple[Content, ...] = ("ink", "momo")
"""A style and the subject; the second style is judged with what these two chose."""
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
WIDENINGS = 3
"""So many further rates, each twice or half the last, are tried while the best is at an edge."""
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
"""Of trials that are done, by their key; of one that failed there is a status, and no figure."""


def phases() -> Iterator[tuple[str, Callable[[Results], list[Trial]]]]:
    """Name of each phase, and all of its trials; it may be asked for once those before it are done."""
    for _ in range(1 + WIDENINGS):
        yield "learning rates", lambda results: [trial for way in WAYS for trial in rates_of(way, results)]
    yield "alphas", lambda results: [trial for way in WAYS for trial in alphas_of(way, results)]
    yield "equal steps", lambda results: [trial for way in WAYS for trial in table_of(way, results)]
    yield "controls", controls
    yield "recipe", recipe
    yield "equal cost", lambda results: [trial for way in WAYS for trial in equal_cost_of(way, results)]


def rates_of(way: Way, results: Results) -> list[Trial]:
    """Unjudged, for each of ``TUNED_ON``: the first rates, then one beyond the edge that was best."""
    rates = list(LEARNING_RATES)
    for _ in range(WIDENINGS):
        trials = _at(way, rates)
        if any(trial.key not in results for trial in trials):
            break
        best = _best(trials, results).learning_rate
        if best == rates[-1]:
            rates.append(2 * best)
        elif best == rates[0]:
            rates.insert(0, best / 2)
        else:
            break
    return _at(way, rates)


def alphas_of(way: Way, results: Results) -> list[Trial]:
    """Other alphas at the learning rate that was best."""
    best = _best(rates_of(way, results), results)
    return [
        replace(best, content=content, alpha_ratio=ratio) for ratio in ALPHA_RATIOS for content in TUNED_ON
    ]


def tuned(way: Way, results: Results) -> Trial:
    """The best of a way's tuning trials: the lowest mean of held-out losses, as shares of the base's."""
    return _best([*rates_of(way, results), *alphas_of(way, results)], results)


def table_of(way: Way, results: Results, steps: int = STEPS) -> list[Trial]:
    """Every content and seed, judged."""
    return _judged(replace(tuned(way, results), steps=steps))


def equal_cost_of(way: Way, results: Results) -> list[Trial]:
    """So many steps as take the CPU seconds of attention's; the table's own trials where that is as many."""
    cost = _step_cost(table_of(way, results), results)
    attention_cost = _step_cost(table_of(ATTENTION_WAY, results), results)
    steps = round(STEPS * attention_cost / cost / 10) * 10
    return table_of(way, results, STEPS if abs(steps / STEPS - 1) <= EQUAL else steps)


def controls(results: Results) -> list[Trial]:
    """One that must lose, too few layers at attention's rate; one that must win, all for twice the steps."""
    loser = replace(tuned(ATTENTION_WAY, results), way=LOSER.name)
    return [*_judged(loser), *table_of(FULL_WAY, results, 2 * STEPS)]


def recipe(results: Results) -> list[Trial]:
    """The way that learns best as it is, and with one setting changed at a time, on the first seeds."""
    best_way = max(WAYS, key=lambda way: success(table_of(way, results), results))
    usual = [
        trial
        for trial in table_of(best_way, results)
        if trial.seed != SEEDS[-1] and trial.content in TUNED_ON
    ]
    changes = [{name: value} for name, values in RECIPE.items() for value in values]
    return usual + [replace(trial, **change) for change in changes for trial in usual]


def success(trials: Iterable[Trial], results: Results) -> float:
    """Mean over trials of the share that shows what was to be learned, times the share that keeps its colour.

    From 0 to 1; a trial that failed has learned nothing.
    """
    return mean(_success(trial, results[trial.key]) for trial in trials)


def _success(trial: Trial, figures: Mapping[str, Any]) -> float:
    learned = figures.get("shows_subject" if trial.content == SUBJECT else "in_style", 0.0)
    return learned * figures.get("keeps_colour", 0.0)


def _at(way: Way, rates: Iterable[float]) -> list[Trial]:
    return [
        Trial(way.name, content, TUNING_SEED, STEPS, rate, is_judged=False)
        for rate in rates
        for content in TUNED_ON
    ]


def _judged(trial: Trial) -> list[Trial]:
    return [
        replace(trial, content=content, seed=seed, is_judged=True) for content in CONTENTS for seed in SEEDS
    ]


def _step_cost(trials: Iterable[Trial], results: Results) -> float:
    """Mean CPU seconds of a step; infinite where no trial came to its end."""
    costs = [results[trial.key].get("step_cpu_seconds") for trial in trials]
    return mean([cost for cost in costs if cost] or [math.inf])


def _best(trials: Iterable[Trial], results: Results) -> Trial:
    groups: dict[tuple[float, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.learning_rate, trial.alpha_ratio), []).append(trial)

    def loss(group: list[Trial]) -> float:
        shares = [share_of_base(results[trial.key]) for trial in group]
        return mean(shares)

    return min(groups.values(), key=loss)[0]


def share_of_base(figures: Mapping[str, Any]) -> float:
    """The held-out loss as a share of the base's; infinite where the trial failed or diverged."""
    share = figures.get("held_out_loss", math.inf) / figures.get("held_out_loss_before", 1.0)
    return share if math.isfinite(share) else math.inf
