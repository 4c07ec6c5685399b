"""Forecasts: of the tiny model in detail, of SDXL against the bars."""

import pytest
import torch

from lora_utils import UserError
from lora_utils.config.training import LoraConfig
from lora_utils.memory import simulation, unet_footprint
from lora_utils.memory.cards import CARDS, CardError, card_here, find_card
from lora_utils.memory.footprint import cached_on_disk, encoding_footprint
from lora_utils.memory.forecast import forecast, replan
from lora_utils.memory.planning import largest_batch, plan_step, step_shape
from lora_utils.memory.simulation import SimulationError
from lora_utils.memory.unet_footprint import StepShape, training_footprint
from lora_utils.model import architectures
from lora_utils.system.device import choose_precision
from lora_utils.system.units import GIB


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(autouse=True)
def _own_cache(kept, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))


def tiny_shape(make_config, **overrides):
    config = make_config(**overrides)
    architecture = architectures.find_architecture(config.model, None)
    return step_shape(config, choose_precision("auto", (7, 5)), architecture, (256, 256))


def tiny_footprint(make_config, **overrides):
    return cached_on_disk(training_footprint, tiny_shape(make_config, **overrides))


@pytest.mark.parametrize(
    ("targets", "trainable", "gib", "kernels", "tflop"),
    [(["attn"], 46_448_640, 9.5, 7_100, 14.7), (["full"], 97_239_040, 11.5, 8_200, 15.4)],
    ids=["attention", "all layers"],
)
def test_sdxl_trains_on_a_t4_with_nothing_recomputed(targets, trainable, gib, kernels, tflop):
    lora = LoraConfig(rank=32, target_modules=targets)
    shape = StepShape(architectures.UNET, lora, "fp16", "plain", "adamw", 1, (1024, 1024), 77)
    footprint = training_footprint(shape)
    assert footprint.trainable == trainable
    assert footprint.weights == 2_567_463_684
    assert footprint.peak_bytes / GIB == pytest.approx(gib, abs=0.25)
    assert footprint.reserved_bytes / GIB <= gib + 0.9
    assert footprint.work.kernels <= kernels
    assert footprint.work.tflop == pytest.approx(tflop, rel=0.02)


def test_every_stage_is_forecast_and_its_parts_add_up(make_config):
    run = forecast(make_config(resolution=256), find_card("t4"))
    assert list(run.stages) == ["captions", "images", "train", "save", "compare"]
    for stage in run.stages.values():
        on_card = stage.reserved_gib + 0.35
        assert sum(stage.parts_gib.values()) == pytest.approx(on_card, rel=1e-6)
        assert 0 < stage.allocated_gib <= stage.reserved_gib <= run.card.usable_gib
        assert min(stage.parts_gib.values()) >= 0
        assert stage.host_ram_gib > 0
    assert run.stages["train"].seconds > 0
    assert run.stages["captions"].disk_gib < 1e-3  # a local folder is not downloaded
    assert run.plan.label == "none"
    assert not run.assumes_sdxl


def test_a_model_that_is_not_here_is_taken_for_sdxl(make_config):
    config = make_config(pretrained_model_name_or_path="someone/something")
    architecture = architectures.find_architecture(config.model, None)
    assert architecture.is_assumed
    assert architecture.unet["cross_attention_dim"] == 2048


def test_a_forecast_is_counted_once(make_config, monkeypatch):
    config = make_config(resolution=256)
    first = forecast(config, find_card("t4"))
    monkeypatch.setattr(unet_footprint, "make_lean", None)
    assert forecast(config, find_card("t4")) == first


def test_what_keeps_more_needs_more(make_config):
    def peak(**overrides):
        return tiny_footprint(make_config, train_batch_size=8, **overrides).peak_bytes

    usual = peak()
    assert peak(base_precision="nf4") < usual  # of the tiny U-Net half stays in full
    assert peak(base_precision="int8") < usual
    # Nothing of this rank is large enough to be paged.
    assert peak(optimizer="paged_adamw8bit") == peak(optimizer="adamw8bit")
    wide = {"rank": 1024, "target_modules": ["attn"]}
    assert peak(optimizer="paged_adamw", **wide) < peak(optimizer="adamw", **wide)
    assert usual < peak(lean_step=False)
    assert usual < peak(max_token_length=225)


@pytest.mark.parametrize("share", [0.85, 0.6])
def test_a_plan_keeps_its_budget(make_config, share):
    shape = tiny_shape(make_config, train_batch_size=8)
    plain = tiny_footprint(make_config, train_batch_size=8)
    budget = share * plain.needed_bytes
    planned = plan_step(shape, find_card("t4"), budget / GIB)
    assert planned.plan.label == "auto"
    assert planned.planned.needed_bytes <= budget
    assert 0 < planned.plan.share < 1
    assert planned.plan.predicted_bytes == planned.planned.peak_bytes < plain.peak_bytes


def test_no_budget_means_the_card(make_config):
    config = make_config(resolution=256)
    assert forecast(config, find_card("4gb")).budget_gib == find_card("4gb").usable_gib
    assert forecast(make_config(resolution=256, vram_gib=2), find_card("t4")).budget_gib == 2


def test_gradient_checkpointing_can_be_decided_by_hand(make_config):
    tight = {"resolution": 256, "train_batch_size": 8, "vram_gib": 0.1}
    assert forecast(make_config(gradient_checkpointing="none", **tight), find_card("t4")).plan.label == "none"
    full = forecast(make_config(gradient_checkpointing="full", resolution=256), find_card("t4"))
    assert full.plan.label == "full"


@pytest.mark.parametrize("budget", [0.8, 0.7, 0.6])
def test_a_wrong_forecast_is_corrected(make_config, budget):
    needed_gib = tiny_footprint(make_config, train_batch_size=8).needed_bytes / GIB
    config = make_config(resolution=256, train_batch_size=8, vram_gib=budget * needed_gib)
    run = forecast(config, find_card("t4"))

    def corrected(factor):
        plan = replan(run, int(factor * run.plan.predicted_bytes))
        return run.plan.share if plan is None else plan.share

    # The tiny U-Net's few modules are coarse: a small surprise may well leave the plan as it is.
    factors = [0.6, 0.7, 0.8, 0.9, 0.98, 1.02, 1.1, 1.2]
    shares = [corrected(factor) for factor in factors]
    assert shares == sorted(shares)
    assert shares[0] < corrected(0.98) == run.plan.share == corrected(1.02) < shares[-1]


def test_the_largest_batch_fits_and_the_next_one_does_not(make_config):
    batch = largest_batch(make_config(resolution=256, vram_gib=0.4), find_card("t4"))
    fits, does_not = (
        tiny_footprint(make_config, train_batch_size=size).needed_bytes for size in (batch, batch + 2)
    )
    assert fits <= 0.4 * GIB < does_not


@pytest.mark.parametrize("ask", [forecast, largest_batch])
def test_a_torch_that_cannot_be_simulated_is_named_with_what_to_do(make_config, monkeypatch, ask):
    monkeypatch.setattr(simulation, "is_supported", lambda: False)
    with pytest.raises(SimulationError, match=r"cannot be forecast; install an older torch, or .*=full$"):
        ask(make_config(resolution=64), find_card("t4"))
    assert issubclass(SimulationError, UserError)


def test_the_vae_needs_more_for_more_pixels():
    small = encoding_footprint(architectures.VAE, (512, 512), 1, torch.float32)
    large = encoding_footprint(architectures.VAE, (1024, 1024), 1, torch.float32)
    assert large.peak_bytes / GIB == pytest.approx(2.82, abs=0.02)
    assert small.peak_bytes < large.peak_bytes / 2


def test_cards_have_names():
    assert find_card("T4").usable_gib == 14.3
    assert find_card("NVIDIA A100").compute_capability == (8, 0)
    with pytest.raises(CardError, match="rtx3060"):
        find_card("voodoo2")


@pytest.mark.parametrize("name", CARDS)
def test_precision_follows_the_card(name):
    capability = CARDS[name].compute_capability
    assert choose_precision("auto", capability).name == ("bf16" if capability >= (8, 0) else "fp16")
    assert choose_precision("fp32", capability).name == "fp32"


def test_a_forecast_hears_accelerate_launch_as_training_does(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert forecast(make_config(resolution=64), find_card("a100")).precision.name == "fp16"


def test_the_machine_at_hand_is_measured():
    here = card_here(torch.float32)
    assert here.is_measured
    assert min(here.gemm_tflops, here.conv_tflops, here.attention_tflops, here.bandwidth_gbs) > 0
    assert 0 < here.usable_gib <= here.total_gib
