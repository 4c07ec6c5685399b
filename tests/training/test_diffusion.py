"""The maths against diffusers' own."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr

from lora_utils.training import diffusion, seeds

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TIMESTEPS = torch.tensor([0, 17, 500, 999])


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2)]


def test_noise_is_added_as_diffusers_adds_it(pair):
    mine = diffusion.add_noise(*pair, TIMESTEPS, SCHEDULER.alphas_cumprod)
    torch.testing.assert_close(mine, SCHEDULER.add_noise(*pair, TIMESTEPS))


def test_velocity_is_diffusers_velocity(pair):
    mine = diffusion.training_target(*pair, TIMESTEPS, SCHEDULER.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(mine, SCHEDULER.get_velocity(*pair, TIMESTEPS))


def test_epsilon_is_the_noise(pair):
    assert diffusion.training_target(*pair, TIMESTEPS, SCHEDULER.alphas_cumprod, "epsilon") is pair[1]


def test_signal_to_noise_is_diffusers_signal_to_noise():
    mine = diffusion.signal_to_noise(TIMESTEPS, SCHEDULER.alphas_cumprod)
    torch.testing.assert_close(mine, compute_snr(SCHEDULER, TIMESTEPS), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("kind", "divisor"), [("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1)]
)
def test_min_snr_is_the_papers_formula(kind, divisor):
    snr = diffusion.signal_to_noise(TIMESTEPS, SCHEDULER.alphas_cumprod)
    paper = torch.minimum(snr, torch.tensor(5.0)) / divisor(snr)
    torch.testing.assert_close(diffusion.min_snr_weights(snr, 5.0, kind), paper)


def test_min_snr_survives_a_terminal_snr_of_zero():
    for kind in ("epsilon", "v_prediction"):
        assert torch.isfinite(diffusion.min_snr_weights(torch.zeros(1), 5.0, kind)).all()


def test_latents_are_drawn_as_diffusers_draws_them():
    moments = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(2)) * 0.13025
    torch.testing.assert_close(
        diffusion.sample_latents(moments, 0.13025, torch.Generator().manual_seed(2)), theirs
    )


def test_errors_of_fp16_do_not_overflow():
    prediction, target = torch.full((1, 4, 2, 2), 300.0).half(), torch.zeros(1, 4, 2, 2).half()
    assert diffusion.squared_errors(prediction, target, torch.ones(1, 1, 2, 2)).item() == 90000


def test_an_epoch_visits_everything_once_in_an_order_of_its_own():
    orders = [seeds.data_order(0, epoch, 50).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[1] != seeds.data_order(1, 0, 50).tolist()


def test_visits_of_neighbouring_seeds_share_no_noise():
    draws = {
        torch.randn(1, generator=seeds.visit_generator(seed, number)).item()
        for seed in range(10)
        for number in range(10)
    }
    assert len(draws) == 100
