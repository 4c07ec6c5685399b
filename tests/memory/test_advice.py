"""What check says of a run on a card."""

from dataclasses import replace

import pytest

from lora_utils import notebook, stages
from lora_utils.cli import main
from lora_utils.memory import cards
from lora_utils.memory.advice import judge_run


@pytest.fixture
def config(make_config, tmp_path):
    return make_config(cache_dir=tmp_path, rank=4, mixed_precision="fp16")


def card_of(usable_gib):
    return replace(cards.T4, name="small", total_gib=usable_gib + 0.01, usable_gib=usable_gib)


def test_what_fits_passes_and_says_what_a_larger_batch_would_do(config):
    judged = judge_run(config, cards.T4, examples=20)
    assert set(judged.judgements.values()) == {"PASS"}
    assert list(judged.forecast.stages) == ["captions", "images", "train", "save", "compare"]
    assert judged.suggestions == []
    assert judged.largest_batch > config.train.train_batch_size
    assert "min for 3 steps" in str(judged)


def test_what_does_not_fit_fails_and_what_would_help_helps(make_config, tmp_path):
    config = make_config(
        cache_dir=tmp_path, train_batch_size=8, mixed_precision="fp16", gradient_checkpointing="none"
    )
    needed = judge_run(config, cards.T4).forecast.stages["train"].reserved_gib
    judged = judge_run(config, card_of(needed / 2))
    assert judged.judgements["train"] == "FAIL"
    settings = [suggestion.setting for suggestion in judged.suggestions]
    assert {"gradient_checkpointing=auto", "base_precision=nf4"} & set(settings)
    assert all(suggestion.saves_gib > 0 for suggestion in judged.suggestions)
    assert any(setting.startswith("train_batch_size=1") for setting in settings)
    batch = replace_train(config, train_batch_size=1, gradient_accumulation_steps=8)
    smaller = next(
        suggestion for suggestion in judged.suggestions if suggestion.setting.startswith("train_batch_size=1")
    )
    assert judge_run(batch, cards.T4).forecast.stages["train"].reserved_gib == pytest.approx(
        smaller.reserved_gib
    )


def replace_train(config, **changes):
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def test_a_plan_that_fits_is_no_failure(make_config, tmp_path):
    config = make_config(cache_dir=tmp_path, rank=4, train_batch_size=8, mixed_precision="fp16")
    needed = judge_run(config, cards.T4).forecast.stages["train"].reserved_gib
    judged = judge_run(config, card_of(0.8 * needed))
    assert judged.forecast.plan.label == "auto"
    assert judged.judgements["train"] in ("PASS", "TIGHT")
    assert "recomputed" in str(judged)


def test_the_command_answers_for_a_card_that_is_not_here(config, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(stages.dump_config(config))
    assert main(["check", "--config", str(file), "--card", "t4"]) == 0
    assert capsys.readouterr().out.startswith("t4: 14.3 of 14.8 GiB can be used")
    assert main(["check", "--config", str(file), "--card", "t5"]) == 2
    assert "choose one of t4" in capsys.readouterr().err
    assert not config.paths.output_dir.exists()


def test_the_picture_shows_every_stage(config):
    figure = notebook.memory_bars(judge_run(config, cards.T4).forecast)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "captions"
    assert len(figure.axes[0].patches) == 5 * 6
