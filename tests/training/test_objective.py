"""What a visit draws and what training averages: each setting changes what it should, and only that."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from lora_utils.config.training import LoraConfig, TrainConfig
from lora_utils.model import lora
from lora_utils.model.base import NoiseSchedule
from lora_utils.training import diffusion, objective, seeds
from lora_utils.training.validation import HeldOutLoss
from tests.conftest import TINY

SCHEDULER = DDPMScheduler.from_pretrained(TINY, subfolder="scheduler")


@pytest.fixture(scope="module")
def unet():
    """With an adapter that already changes something."""
    unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet")
    for parameter in lora.add_lora(unet, LoraConfig(rank=2), seed=0):
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    return unet.eval()


@pytest.fixture(scope="module")
def example(unet):
    generator = torch.Generator().manual_seed(7)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "moments": torch.randn(8, 8, 8, generator=generator),
        "prompt_embeds": torch.randn(5, unet.config.cross_attention_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(pooled, generator=generator),
        "time_ids": torch.tensor([64.0, 64, 0, 0, 64, 64]),
        "loss_mask": torch.rand(1, 8, 8, generator=generator),
    }


def schedule(kind="epsilon"):
    return NoiseSchedule(SCHEDULER.alphas_cumprod, kind, 0.13025)


def visits(example, count=3, **settings):
    config = TrainConfig(**settings)
    drawn = [
        objective.draw_visit(example, seeds.visit_generator(0, number), schedule(), config=config)
        for number in range(count)
    ]
    return objective.collate(drawn)


def test_zero_terminal_snr_is_for_bases_that_predict_v():
    config = TrainConfig(rescale_betas_zero_snr=True)
    assert objective.training_schedule(schedule("v_prediction"), config).alphas_cumprod[-1] == 0
    with pytest.raises(objective.ObjectiveError, match="rescale_betas_zero_snr=false"):
        objective.training_schedule(schedule(), config)


def test_timesteps_beyond_the_schedule_are_refused():
    for settings in ({"max_timestep": 1001}, {"min_timestep": 1000}):
        with pytest.raises(objective.ObjectiveError, match="1000 timesteps"):
            objective.training_schedule(schedule(), TrainConfig(**settings))
    kept = schedule()
    assert objective.training_schedule(kept, TrainConfig(max_timestep=1000, min_timestep=999)) is kept


def test_timesteps_cover_their_range_and_nothing_else(example):
    whole, range_of_ten = visits(example, 300), visits(example, 300, min_timestep=200, max_timestep=210)
    assert whole.timesteps.min() < 50
    assert whole.timesteps.max() > 950
    assert sorted(set(range_of_ten.timesteps.tolist())) == list(range(200, 210))


def test_extreme_logits_stay_in_the_range(example):
    for mean, edge in ((100.0, 299), (-100.0, 100)):
        settings = {
            "timestep_sampling": "logit_normal",
            "logit_mean": mean,
            "min_timestep": 100,
            "max_timestep": 300,
        }
        assert set(visits(example, **settings).timesteps.tolist()) == {edge}


def test_a_plain_visit_draws_latents_noise_and_timestep_in_this_order(example):
    """Runs of earlier versions are repeated bit by bit only as long as this holds."""
    generator = seeds.visit_generator(0, 0)
    latents = diffusion.sample_latents(example["moments"], 0.13025, generator)
    noise = torch.randn(latents.shape, generator=generator)
    timestep = torch.randint(1000, (1,), generator=generator)
    batch = visits(example, 1)
    assert torch.equal(batch.latents[0], latents)
    assert torch.equal(batch.noise[0], noise)
    assert torch.equal(batch.input_noise[0], noise)
    assert torch.equal(batch.timesteps, timestep)


CHANGES = {
    "noise_offset": (0.1, {"noise", "input_noise"}),
    "input_perturbation": (0.1, {"input_noise"}),
    "min_timestep": (500, {"timesteps"}),
    "max_timestep": (100, {"timesteps"}),
    "timestep_sampling": ("logit_normal", {"timesteps"}),
    "loss_type": ("huber", set()),
    "snr_gamma": (5.0, set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_of_the_noise_leaves_the_other_draws_alone(example, name):
    value, expected = CHANGES[name]
    plain, changed = visits(example, 10), visits(example, 10, **{name: value})
    assert {
        field for field, tensor in vars(plain).items() if not torch.equal(tensor, vars(changed)[field])
    } == expected


def test_noise_offset_is_one_number_per_channel(example):
    shift = visits(example, 200, noise_offset=0.1).noise - visits(example, 200).noise
    assert shift.std(dim=(2, 3)).max() < 1e-6
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.1, rel=0.1)


def test_input_perturbation_is_on_the_input_alone_and_apart_from_the_noise(example):
    batch = visits(example, 20, input_perturbation=0.1)
    extra = batch.input_noise - batch.noise
    assert extra.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.corrcoef(torch.stack([extra.flatten(), batch.noise.flatten()]))[0, 1].abs() < 0.05


def reference(unet, batch, kind, weight=lambda snr: 1, error=torch.square):
    """The formula with diffusers' scheduler."""
    scheduler = DDPMScheduler.from_config(SCHEDULER.config, prediction_type=kind)
    noisy_latents = scheduler.add_noise(batch.latents, batch.input_noise, batch.timesteps)
    added = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.time_ids}
    answer = unet(noisy_latents, batch.timesteps, batch.prompt_embeds, added_cond_kwargs=added).sample
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    errors = error(answer - (batch.noise if kind == "epsilon" else velocity)) * batch.loss_mask
    alpha = scheduler.alphas_cumprod[batch.timesteps]
    return errors.mean(dim=(1, 2, 3)) * weight(alpha / (1 - alpha))


OBJECTIVES = {
    "plain": ({}, {}),
    "min-SNR": ({"snr_gamma": 5.0}, {"weight": lambda snr: snr.clamp(max=5) / snr}),
    "debiased": ({"debiased_estimation_loss": True}, {"weight": lambda snr: 1 / snr.clamp(max=1000).sqrt()}),
    "huber": (
        {"loss_type": "huber", "huber_c": 0.3},
        {"error": lambda e: 0.6 * (torch.sqrt(e**2 + 0.09) - 0.3)},
    ),
    "perturbed": ({"input_perturbation": 0.1, "noise_offset": 0.05}, {}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_the_loss_of_each_example_is_the_formula(unet, example, name):
    settings, formula = OBJECTIVES[name]
    batch = visits(example, **settings)
    mine = objective.training_losses(unet, batch, schedule(), TrainConfig(**settings))
    assert mine.shape == (3,)
    torch.testing.assert_close(mine, reference(unet, batch, "epsilon", **formula), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({"snr_gamma": 5.0}, lambda snr: snr.clamp(max=5) / (snr + 1)),
        ({"debiased_estimation_loss": True}, lambda snr: 1 / (snr.clamp(max=1000) + 1)),
    ],
)
@torch.no_grad()
def test_bases_that_predict_v_have_weights_of_their_own(unet, example, settings, weight):
    batch = visits(example)
    mine = objective.training_losses(unet, batch, schedule("v_prediction"), TrainConfig(**settings))
    torch.testing.assert_close(mine, reference(unet, batch, "v_prediction", weight), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_plain_training_loss_is_the_error_that_validation_measures(unet, example):
    batch = visits(example)
    errors = objective.denoising_errors(unet, batch, schedule())
    assert torch.equal(objective.training_losses(unet, batch, schedule(), TrainConfig()), errors)


def test_an_adapter_on_the_first_layer_does_not_decide_the_input_dtype(example):
    unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet").to(torch.bfloat16)
    lora.add_lora(unet, LoraConfig(rank=2, target_modules=["conv_in"]), seed=0)
    seen = []
    unet.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        objective.denoising_errors(unet, visits(example, 1), schedule())
    assert seen == [torch.bfloat16]


def test_the_held_out_loss_is_plain_on_the_schedule_of_the_run(unet, example):
    class Examples(list):
        read = list.__getitem__

    measured = HeldOutLoss(Examples([example]), schedule(), 8).measure(unet, torch.device("cpu"))
    generator = seeds.visit_generator(0, 0)
    middles = range(62, 1000, 125)
    batch = objective.collate(
        [objective.draw_visit(example, generator, schedule(), middle) for middle in middles]
    )
    assert batch.timesteps.tolist() == list(middles)
    with torch.no_grad():
        assert measured == pytest.approx(reference(unet, batch, "epsilon").mean().item(), rel=1e-5)
    terminal = objective.training_schedule(schedule("v_prediction"), TrainConfig(rescale_betas_zero_snr=True))
    assert HeldOutLoss(Examples([example]), terminal, 8).measure(unet, torch.device("cpu")) != measured


def test_a_given_timestep_leaves_the_draws_that_follow_as_they_were(example):
    """Held-out losses of earlier versions stay comparable only as long as this holds."""
    given, drawn = seeds.visit_generator(0, 0), seeds.visit_generator(0, 0)
    objective.draw_visit(example, given, schedule(), 5)
    objective.draw_visit(example, drawn, schedule())
    assert torch.equal(given.get_state(), drawn.get_state())


def test_pure_noise_gives_a_finite_gradient(unet, example):
    config = TrainConfig(rescale_betas_zero_snr=True, snr_gamma=5.0, min_timestep=999)
    terminal = objective.training_schedule(schedule("v_prediction"), config)
    batch = objective.draw_visit(example, seeds.visit_generator(0, 0), terminal, config=config)
    objective.training_losses(unet, batch, terminal, config).mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in unet.parameters() if parameter.requires_grad)
    noisy_latents = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps, terminal.alphas_cumprod)
    assert torch.equal(noisy_latents, batch.noise)
