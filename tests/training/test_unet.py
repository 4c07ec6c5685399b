"""Fitting a run to a card: plans, full memory, corrections after the first steps."""

import json

import pytest
import torch

from lora_utils import stages
from lora_utils.model.files import ModelError
from lora_utils.system.units import GIB
from lora_utils.training import loop
from lora_utils.training.loop import MemoryFullError


@pytest.fixture
def config(make_config, tight_gib):
    return make_config(vram_gib=tight_gib(make_config(rank=4)), rank=4)


def fill_memory(unet, times):
    """The next forward passes end as they do on a full card."""
    remaining = iter(range(times))

    def fail(*_):
        if next(remaining, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return unet.get_submodule("mid_block").register_forward_pre_hook(fail)


def test_a_small_budget_recomputes_a_part_and_says_so(config):
    plan = stages.prepare_training(config).planned.plan
    assert 0 < plan.share < 1
    assert 0 < plan.predicted_bytes <= config.train.vram_gib * GIB
    list(stages.train(config))
    summary = json.loads((config.paths.output_dir / "summary.json").read_text())
    assert summary["recompute"] == str(plan)
    assert "feed-forwards" in summary["recompute"]
    assert summary["forecast_memory_gib"] == round(plan.predicted_bytes / GIB, 2)


def test_a_step_that_does_not_fit_is_tried_again_with_more_recomputed(config, caplog):
    expected = [report.loss for report in stages.train(config)]
    run = stages.prepare_training(config)
    share = run.planned.plan.share
    fill_memory(run.planned.unet, times=2)
    losses = [report.loss for report in loop.train(config, run)]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert run.planned.plan.share > share
    assert "the same batch is tried again" in caplog.text


def test_when_everything_is_recomputed_and_it_still_does_not_fit_the_advice_is_clear(config):
    run = stages.prepare_training(config)
    fill_memory(run.planned.unet, times=1000)
    with pytest.raises(
        MemoryFullError, match=r"(?s)there is no checkpoint yet\nby forecast.* GiB, .* less"
    ) as caught:
        list(loop.train(config, run))
    assert str(caught.value).count("\n  with ") in (1, 2, 3)
    assert json.loads((config.paths.output_dir / "summary.json").read_text())["status"] == "failed"


def test_without_a_plan_nothing_is_tried_in_silence(make_config):
    config = make_config(gradient_checkpointing="none")
    run = stages.prepare_training(config)
    fill_memory(run.planned.unet, times=1)
    with pytest.raises(MemoryFullError, match="gradient_checkpointing"):
        list(loop.train(config, run))


@pytest.mark.parametrize(("factor", "changes"), [(1.01, False), (1.15, True)])
def test_a_forecast_that_is_off_is_corrected(config, factor, changes):
    planned = stages.prepare_training(config).planned
    before = planned.plan
    said = planned.correct(before.predicted_bytes * factor / GIB)
    assert (said is not None) == changes
    assert not said or f"not the {before.predicted_bytes / GIB:.2f} expected" in said
    assert (planned.plan != before) == changes


def test_a_plan_that_was_tightened_is_not_loosened_again(config):
    planned = stages.prepare_training(config).planned
    expected = planned.plan.predicted_bytes
    assert planned.make_room()
    tightened = planned.plan
    assert planned.correct(0.8 * expected / GIB) is None
    assert planned.plan == tightened


def test_a_base_in_fp16_needs_a_computation_in_fp16(make_config):
    with pytest.raises(ModelError, match="base_precision"):
        list(stages.train(make_config(base_precision="fp16")))


@pytest.mark.parametrize("base_precision", ["int8", "nf4"])
def test_a_quantised_base_trains_alike(make_config, tmp_path, base_precision):
    plain = [report.loss for report in stages.train(make_config(output_dir=tmp_path / "plain"))]
    quantised = make_config(output_dir=tmp_path / "quantised", base_precision=base_precision)
    assert [report.loss for report in stages.train(quantised)] == pytest.approx(plain, rel=0.05)
