"""Plans: the same gradients, less memory, the cheapest parts first."""

import pytest
import torch

from lora_utils.config.training import LoraConfig
from lora_utils.memory.gradient_checkpointing import (
    BLOCK,
    FEED_FORWARD,
    RESNET,
    Plan,
    Price,
    Prices,
    apply_plan,
    choose,
    tighter,
)
from lora_utils.model.lean import make_lean
from lora_utils.model.lora import add_lora


def prices(blocks=10):
    units = [Price("resnet", RESNET, 90, 1.0)]
    for number in range(blocks):
        units.append(Price(f"b{number}", BLOCK, 110, 6.0))
        units.append(Price(f"b{number}.ff", FEED_FORWARD, 60, 1.3))
    return Prices(5000, tuple(units))


@pytest.fixture
def unet(fresh_pipeline):
    unet = fresh_pipeline.unet.train()
    add_lora(unet, LoraConfig(rank=4), seed=0)
    for name, parameter in unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    make_lean(unet)
    return unet


def gradients(unet):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    embeds = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    unet(latents, torch.tensor([3]), embeds, added_cond_kwargs=added).sample.square().sum().backward()
    of_adapters = [parameter.grad for parameter in unet.parameters() if parameter.requires_grad]
    unet.zero_grad()
    return of_adapters


def names(unet, module_class):
    return tuple(name for name, module in unet.named_modules() if type(module).__name__ == module_class)


def test_no_plan_changes_a_gradient(unet):
    plain = gradients(unet)
    mixed = (*names(unet, FEED_FORWARD)[::2], *names(unet, RESNET))
    for plan in (Plan(names(unet, BLOCK), "auto"), Plan(mixed, "auto"), Plan((), "full"), Plan()):
        apply_plan(unet, plan)
        assert all(
            torch.equal(gradient, other) for gradient, other in zip(gradients(unet), plain, strict=True)
        )


def test_a_plan_replaces_the_one_before_it(unet):
    before = {name: module.__dict__.get("forward") for name, module in unet.named_modules()}
    for plan in (
        Plan(names(unet, BLOCK), "auto"),
        Plan(names(unet, BLOCK), "auto"),
        Plan((), "full"),
        Plan(),
    ):
        apply_plan(unet, plan)
    assert {name: module.__dict__.get("forward") for name, module in unet.named_modules()} == before
    assert not unet.is_gradient_checkpointing


def test_parts_run_once_where_nothing_is_learned(unet):
    apply_plan(unet, Plan(names(unet, BLOCK), "auto"))
    with torch.no_grad():
        block = unet.get_submodule(names(unet, BLOCK)[0])
        width = block.norm1.normalized_shape[0]
        out = block(
            torch.zeros(1, 4, width), encoder_hidden_states=torch.zeros(1, 5, unet.config.cross_attention_dim)
        )
    assert not out.requires_grad


@pytest.mark.parametrize("budget", range(3600, 5100, 100))
def test_a_plan_frees_what_is_missing_and_one_unit_more(budget):
    plan = choose(prices(), budget)
    assert plan.label == "none" if budget >= 5000 else plan.predicted_bytes <= budget or plan.label == "full"


def test_a_smaller_budget_costs_more():
    shares = [choose(prices(), budget).share for budget in range(5000, 3500, -50)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1


def test_feed_forwards_go_first_and_resnets_last():
    small = choose(prices(), 4700)
    large = choose(prices(), 4080)
    assert all(name.endswith(".ff") for name in small.units)
    assert sum(not name.endswith(".ff") for name in large.units) > 0
    assert "resnet" not in large.units
    assert not {f"{name}.ff" for name in large.units} & set(large.units)  # never a block and its part


def test_a_block_that_is_better_whole_is_taken_whole():
    units = (Price("b", BLOCK, 110, 2.0), Price("b.ff", FEED_FORWARD, 10, 1.0))
    assert choose(Prices(1000, (*units, Price("c", BLOCK, 110, 9.0))), 999).units == ("b", "c")


def test_what_cannot_fit_is_recomputed_whole():
    assert choose(prices(), 100).label == "full"


def test_tightening_ends_when_everything_is_recomputed():
    plan = choose(prices(), 4900)
    seen = []
    while plan is not None:
        seen.append(plan)
        plan = tighter(plan, prices())
    assert [plan.share for plan in seen] == sorted(plan.share for plan in seen)
    assert seen[-1].label == "full"
