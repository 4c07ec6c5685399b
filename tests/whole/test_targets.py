"""The plan of benchmarks.targets: which trials follow from made-up results, and which results still hold."""

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import record
from benchmarks.targets import kept, plan
from benchmarks.targets.trials import Trial
from benchmarks.targets.ways import EVERY_WAY, FULL_WAY, LOSER, WAYS
from lora_utils.model import architectures
from lora_utils.tiny.drawing import SUBJECT
from lora_utils.tiny.evaluate import FOLDER

OPTIMUM = {"attn": 3.2e-2, "attn+ff": 1e-3}
"""Where made-up losses are lowest; at the middle of the first rates for all other ways."""
COST = {"attn": 0.2, "attn+ff": 0.202}


def outcome(trial):
    """As if the loss were a parabola over rates and alphas, and full layers the best."""
    best = OPTIMUM.get(trial.way, 4e-3)
    distance = abs(torch.tensor(trial.learning_rate / best).log2().item()) + abs(trial.alpha_ratio - 2)
    figures = {"held_out_loss": 0.1 + 0.01 * distance, "held_out_loss_before": 0.3}
    figures |= {"step_cpu_seconds": COST.get(trial.way, 0.4), "keeps_colour": 1.0}
    learned = {"full": 0.9, "control: the middle's attention": 0.0}.get(trial.way, 0.4)
    return figures | {"shows_subject" if trial.content == SUBJECT else "in_style": learned}


def carried_out(outcome):
    """Trials of each phase, all done with this outcome; and the results."""
    results = {}
    trials_of = {}
    for name, trials in plan.phases():
        trials_of[name] = trials(results)
        results |= {trial.key: outcome(trial) for trial in trials_of[name] if trial.key not in results}
    return trials_of, results


def test_every_way_is_tuned_alike_and_tried_on_everything():
    phases, results = carried_out(outcome)
    rates = {
        way.name: {t.learning_rate for t in phases["learning rates"] if t.way == way.name} for way in WAYS
    }
    assert rates.pop("attn") == {2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2}
    assert rates.pop("attn+ff") == {5e-4, 1e-3, 2e-3, 4e-3, 8e-3}
    assert set(map(tuple, map(sorted, rates.values()))) == {plan.LEARNING_RATES}

    tuned = {way.name: plan.tuned(way, results) for way in WAYS}
    assert all(trial.alpha_ratio == 2 for trial in tuned.values())
    assert tuned["attn"].learning_rate == 3.2e-2
    assert len(set(phases["equal steps"])) == len(WAYS) * len(plan.CONTENTS) * len(plan.SEEDS)
    assert plan.TUNING_SEED not in {trial.seed for trial in phases["equal steps"]}
    steps = {trial.way: trial.steps for trial in phases["equal cost"]}
    assert steps == {way.name: 200 if way.name in COST else 100 for way in WAYS}
    assert {trial.way for trial in phases["recipe"]} == {"full"}


def test_a_way_that_fails_ends_nothing_and_wins_nothing():
    def failing(trial):
        if trial.way == "full" or trial.learning_rate == 8e-3:
            return {"status": "DivergenceError: the loss is nan"}
        if trial.learning_rate == 2e-3:
            return outcome(trial) | {"held_out_loss": float("nan")}
        return outcome(trial)

    phases, results = carried_out(failing)
    assert {trial.way for trial in phases["recipe"]} != {"full"}
    assert all(
        plan.tuned(way, results).learning_rate == 4e-3
        for way in WAYS
        if way.name not in OPTIMUM | {"full": 0}
    )


@pytest.mark.parametrize("way", EVERY_WAY.values(), ids=list(EVERY_WAY))
def test_a_way_has_layers_on_both_bases(way):
    tiny = UNet2DConditionModel.load_config(FOLDER, subfolder="unet")
    with torch.device("meta"):
        counts = [
            len(way.layers(UNet2DConditionModel.from_config(each))) for each in (tiny, architectures.UNET)
        ]
    assert min(counts) > 0


def test_a_result_holds_until_what_it_stands_on_changes(tmp_path, monkeypatch):
    for content in plan.CONTENTS:
        (tmp_path / "work" / content).mkdir(parents=True)
        (tmp_path / "work" / content / "0.txt").write_text(content)
    work = tmp_path / "work"
    monkeypatch.setattr(record, "FOLDER", tmp_path / "results")
    trials = [Trial("attn", "ink", seed, 10, 1e-3) for seed in range(3)] + [
        Trial("attn", SUBJECT, 0, 10, 1e-3)
    ]
    results = {trial.key: asdict(trial) | kept.stands_on(trial, work) for trial in trials}
    results[trials[1].key]["settings"] = "of another preset"
    results[trials[2].key]["way"] = "one that is no more"
    kept.keep(results, {}, {})
    assert list(kept.finished(work)) == [trials[0].key, trials[3].key]

    (tmp_path / "work").rename(tmp_path / "other")
    (tmp_path / "other" / "ink" / "0.txt").write_text("another caption")
    assert list(kept.finished(tmp_path / "other")) == [trials[3].key]
    monkeypatch.setattr(kept, "foundation", lambda: "of another base")
    assert kept.finished(tmp_path / "other") == {}


def test_in_the_kept_table_the_control_that_must_lose_lost_and_the_one_that_must_win_won():
    figures = json.loads((record.FOLDER / "targets.json").read_text())["figures"]
    keys = figures["tables"]["equal steps"] + figures["tables"]["controls"]
    trials = [figures["trials"][key] for key in keys]

    def learned(way, steps):
        chosen = [each for each in trials if (each["way"], each["steps"]) == (way, steps)]
        assert len(chosen) == len(plan.CONTENTS) * len(plan.SEEDS)
        return sum(each["shows_subject" if each["content"] == SUBJECT else "in_style"] for each in chosen)

    shares = [learned(way.name, plan.STEPS) for way in WAYS]
    assert learned(LOSER.name, plan.STEPS) < max(shares) / 10
    assert learned(FULL_WAY.name, 2 * plan.STEPS) > max(shares)
