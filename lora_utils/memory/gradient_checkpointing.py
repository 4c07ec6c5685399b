"""Which modules of the U-Net to recompute in the backward pass, so that a step fits, and at what price.

Gradient checkpointing (Chen et al., 2016) of single feed-forwards, transformer blocks and resnets: what frees
most bytes per second of recomputation goes first (the greedy solution of a knapsack with nested choices).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

BLOCK = "BasicTransformerBlock"
FEED_FORWARD = "FeedForward"
RESNET = "ResnetBlock2D"
RECOMPUTABLE = (BLOCK, FEED_FORWARD, RESNET)
NOTCH = 0.97  # of the memory, each time that a step still did not fit


@dataclass(frozen=True)
class Price:
    """What recomputing one module frees and costs."""

    name: str
    """Of the module in the U-Net."""
    module_class: str
    """One of ``RECOMPUTABLE``."""
    freed_bytes: int
    """What the module keeps for backward beyond its inputs."""
    seconds: float
    """Of its forward pass, once more."""


@dataclass(frozen=True)
class Prices:
    """What can be recomputed in a step, and what the step takes when nothing is."""

    peak_bytes: int
    units: tuple[Price, ...]


@dataclass(frozen=True)
class Plan:
    """What is recomputed."""

    units: tuple[str, ...] = ()
    """Names of the modules."""
    label: str = "none"
    """none, auto or full; full is diffusers' own checkpointing of all blocks and resnets."""
    predicted_bytes: int = field(default=0, compare=False)
    """Peak of tensors on the card; 0 where nobody asked."""
    share: float = field(default=0.0, compare=False)
    """Time for recomputing over the time for recomputing all, in [0, 1]."""

    def __str__(self) -> str:
        if self.label == "none":
            return "nothing is recomputed"
        if self.label == "full":
            return "everything is recomputed"
        feed_forwards = sum(name.endswith(".ff") for name in self.units)
        modules = f"{feed_forwards} feed-forwards and {len(self.units) - feed_forwards} blocks"
        return f"{modules} are recomputed, {self.share:.0%} of everything"


def none_plan(prices: Prices) -> Plan:
    """Recompute nothing."""
    return Plan((), "none", prices.peak_bytes, 0.0)


def full_plan(prices: Prices) -> Plan:
    """Recompute everything; its peak is an estimate until it is forecast."""
    freed_bytes = sum(choice.freed_bytes for choice in _choices(prices.units))
    return Plan((), "full", max(0, prices.peak_bytes - freed_bytes + _slack(prices.units)), 1.0)


def choose(prices: Prices, budget_bytes: float) -> Plan:
    """The least recomputation with which a step stays within a budget; everything where none does.

    Args:
        prices: Of the modules, from a step with nothing recomputed.
        budget_bytes: What tensors may take at a time.
    """
    excess = prices.peak_bytes - budget_bytes
    if excess <= 0:
        return none_plan(prices)

    choices = _choices(prices.units)
    chosen: dict[str, str] = {}  # by block, so that a block replaces its own feed-forward
    freed_bytes = 0
    seconds = 0.0
    for choice in choices:
        chosen[choice.block] = choice.name
        freed_bytes += choice.freed_bytes
        seconds += choice.seconds

        # In backward one recomputed module is there as a whole again, so that much more has to be freed.
        slack = _slack([unit for unit in prices.units if unit.name in chosen.values()])
        if freed_bytes >= excess + slack:
            share = seconds / sum(choice.seconds for choice in choices)
            peak = prices.peak_bytes - freed_bytes + slack
            return Plan(tuple(sorted(chosen.values())), "auto", peak, share)
    return full_plan(prices)


def tighter(plan: Plan, prices: Prices) -> Plan | None:
    """A plan with 3 % less memory, for when the card was full; None when everything is recomputed already."""
    if plan.label == "full":
        return None
    budget = min(plan.predicted_bytes or prices.peak_bytes, prices.peak_bytes) * NOTCH
    tightened = choose(prices, budget)
    # Modules are coarse: a notch can lead to the same plan, which would run out of memory in the same place.
    while tightened.label == "auto" and tightened.share <= plan.share:
        budget *= NOTCH
        tightened = choose(prices, budget)
    return tightened


def apply_plan(unet: nn.Module, plan: Plan) -> None:
    """Recompute what the plan says and nothing else; any number of times, whatever forwards modules were
    given.

    Args:
        unet: A diffusers U-Net, not wrapped for several processes.
        plan: From ``choose``, or made by hand.
    """
    # First off with the plan before this one, or recomputation would be nested in itself.
    for module in unet.modules():
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, _Recomputed):
            del module.forward
            if wrapper.is_own:
                module.forward = wrapper.forward

    model: Any = unet
    if plan.label == "full":
        model.enable_gradient_checkpointing()
        return
    model.disable_gradient_checkpointing()
    for name in plan.units:
        module = unet.get_submodule(name)
        module.forward = _Recomputed(module.forward, "forward" in module.__dict__)


class _Recomputed:
    """A forward pass that keeps its inputs alone, and runs again in backward."""

    def __init__(self, forward: Callable[..., Any], is_own: bool) -> None:
        self.forward = forward
        self.is_own = is_own  # the lean step had given it: the class's own must not take its place afterwards

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without gradients nothing is kept, so there is no backward pass to recompute for.
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # Not reentrant: that gives no gradients where no input requires them, as in the first blocks.
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


@dataclass(frozen=True)
class _Choice(Price):
    """A module to recompute, priced as what it adds to the choice that it replaces."""

    block: str = ""
    """Choices for the same block exclude each other; the later one replaces the earlier."""


def _choices(units: Sequence[Price]) -> list[_Choice]:
    """All choices, best first, those of resnets last."""
    feed_forwards = {
        unit.name.rpartition(".")[0]: unit for unit in units if unit.module_class == FEED_FORWARD
    }
    blocks = {unit.name for unit in units if unit.module_class == BLOCK}
    choices = []
    for block, feed_forward in feed_forwards.items():
        if block not in blocks:
            choices.append(_Choice(**vars(feed_forward), block=block))

    for unit in units:
        feed_forward = feed_forwards.get(unit.name) if unit.module_class == BLOCK else None
        rest = None if feed_forward is None else _without(unit, feed_forward)
        if feed_forward and rest and _rate(feed_forward) > _rate(rest):
            # Two choices of one block: its feed-forward first, and later the whole block for the difference.
            choices.append(_Choice(**vars(feed_forward), block=unit.name))
            choices.append(_Choice(**vars(rest), block=unit.name))
        elif unit.module_class != FEED_FORWARD:
            # Were the feed-forward alone the worse bargain, greed would take the rest before it: one choice.
            choices.append(_Choice(**vars(unit), block=unit.name))

    worthwhile = [choice for choice in choices if choice.freed_bytes > 0]
    return sorted(worthwhile, key=lambda choice: (choice.module_class == RESNET, -_rate(choice), choice.name))


def _without(block: Price, feed_forward: Price) -> Price:
    """What the whole block frees and costs beyond its feed-forward."""
    return replace(
        block,
        freed_bytes=block.freed_bytes - feed_forward.freed_bytes,
        seconds=block.seconds - feed_forward.seconds,
    )


def _rate(price: Price) -> float:
    """Bytes freed per second of recomputation."""
    return price.freed_bytes / max(price.seconds, 1e-12)


def _slack(units: Sequence[Price]) -> int:
    """The largest of the modules, which backward brings back one at a time."""
    return max((unit.freed_bytes for unit in units), default=0)
