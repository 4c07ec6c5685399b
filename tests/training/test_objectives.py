"""The objectives' mathematics against the papers' formulas and diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from lora_utils.training import diffusion
from tests.conftest import TINY

SCHEDULER = DDPMScheduler.from_pretrained(TINY, subfolder="scheduler")
SNR = diffusion.signal_to_noise(torch.tensor([0, 17, 500, 999]), SCHEDULER.alphas_cumprod)


def test_debiased_weights_are_the_papers_with_the_snr_capped():
    assert SNR[0] > 1000
    expected = [1000**-0.5, *(1 / SNR[1:] ** 0.5).tolist()]
    assert diffusion.debiased_weights(SNR, "epsilon").tolist() == pytest.approx(expected)


def test_debiased_weights_of_v_weigh_the_implied_picture_alike():
    """An error of v is (SNR + 1) times that of the x_0 it implies, so 1 / (SNR + 1) leaves that one's own."""
    alpha, error = SNR[1:] / (1 + SNR[1:]), torch.tensor(0.3)
    implied = (1 - alpha).sqrt() * error
    torch.testing.assert_close(diffusion.debiased_weights(SNR[1:], "v_prediction") * error**2, implied**2)


def test_debiased_weights_of_v_survive_a_terminal_snr_of_zero():
    assert diffusion.debiased_weights(torch.zeros(1), "v_prediction") == 1


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_losses_are_square_near_zero_and_straight_far_from_it(kind):
    def loss(distance, c=0.1):
        prediction, mask = torch.full((1, 4, 2, 2), distance), torch.ones(1, 1, 2, 2)
        return diffusion.errors(prediction, torch.zeros(1, 4, 2, 2), mask, kind, c).item()

    factor = 0.1 if kind == "huber" else 1
    formula = 2 * factor * ((0.25**2 + 0.1**2) ** 0.5 - 0.1)
    assert loss(0.25) == pytest.approx(formula)
    assert loss(0.004) == pytest.approx(factor / 0.1 * 0.004**2, rel=1e-3)
    assert loss(1001.0) - loss(1000.0) == pytest.approx(2 * factor, rel=1e-2)
    assert loss(300.0, c=1e4) == pytest.approx(300**2 * (1 if kind == "huber" else 1e-4), rel=1e-2)


def test_errors_count_only_where_the_mask_does():
    prediction, target = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.zeros(3, 1, 6, 6)
    mask[..., :3] = 1
    for kind in ("l2", "huber", "smooth_l1"):
        half = diffusion.errors(prediction[..., :3], target[..., :3], torch.ones(3, 1, 6, 3), kind, 0.1)
        torch.testing.assert_close(diffusion.errors(prediction, target, mask, kind, 0.1), half / 2)


def test_zero_terminal_snr_is_the_papers_algorithm():
    theirs = (1 - rescale_zero_terminal_snr(SCHEDULER.betas)).cumprod(0)
    mine = diffusion.zero_terminal_snr(SCHEDULER.alphas_cumprod)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert mine[-1] == 0
    torch.testing.assert_close(diffusion.zero_terminal_snr(mine), mine)


def test_logit_normal_timesteps_have_a_normal_logit():
    generator = torch.Generator().manual_seed(0)
    drawn = [diffusion.logit_normal_timestep(200, 10_200, 0.5, 0.8, generator) for _ in range(4000)]
    logits = torch.logit((torch.cat(drawn) - 200 + 0.5) / 10_000)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.05)
    assert logits.std().item() == pytest.approx(0.8, abs=0.05)
