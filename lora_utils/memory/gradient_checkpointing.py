"""Which parts of the U-Net to recompute in the backward pass, so that a step fits, and at what price.

Gradient checkpointing (Chen et al., 2016) of single feed-forwards, transformer blocks and resnets: what frees most
bytes per second of recomputation goes first (the greedy solution of a knapsack with nested choices).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

BLOCK, FEED_FORWARD, RESNET = "BasicTransformerBlock", "FeedForward", "ResnetBlock2D"
KINDS = (BLOCK, FEED_FORWARD, RESNET)
NOTCH = 0.97


@dataclass(frozen=True)
class Price:
    """What recomputing one module frees and costs."""

    name: str
    """Of the module in the U-Net."""
    kind: str
    """Its class."""
    freed_bytes: int
    seconds: float


@dataclass(frozen=True)
class Prices:
    """Of one step."""

    peak_bytes: int
    """When nothing is recomputed."""
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
        forwards = sum(name.endswith(".ff") for name in self.units)
        parts = f"{forwards} feed-forwards and {len(self.units) - forwards} blocks"
        return f"{parts} are recomputed, {self.share:.0%} of everything"


def none_plan(prices: Prices) -> Plan:
    """Recompute nothing."""
    return Plan((), "none", prices.peak_bytes, 0.0)


def full_plan(prices: Prices) -> Plan:
    """Recompute everything; its peak is an estimate until it is forecast."""
    steps = _steps(prices.units)
    freed = sum(step.freed_bytes for step in steps)
    return Plan((), "full", max(0, prices.peak_bytes - freed + _slack(prices.units)), 1.0)


def choose(prices: Prices, budget_bytes: float) -> Plan:
    """The least recomputation with which a step stays within a budget; everything where none does.

    In backward one recomputed module is there as a whole again, so that much more has to be freed.
    """
    excess = prices.peak_bytes - budget_bytes
    if excess <= 0:
        return none_plan(prices)
    steps, chosen, freed, seconds = _steps(prices.units), {}, 0, 0.0
    for step in steps:
        chosen[step.block], freed, seconds = step.name, freed + step.freed_bytes, seconds + step.seconds
        slack = _slack([unit for unit in prices.units if unit.name in chosen.values()])
        if freed >= excess + slack:
            share = seconds / sum(step.seconds for step in steps)
            return Plan(tuple(sorted(chosen.values())), "auto", prices.peak_bytes - freed + slack, share)
    return full_plan(prices)


def tighter(plan: Plan, prices: Prices) -> Plan | None:
    """The plan with 3 % less memory, for when the card was full; None when everything is recomputed already."""
    if plan.label == "full":
        return None
    budget = min(plan.predicted_bytes or prices.peak_bytes, prices.peak_bytes) * NOTCH
    while (found := choose(prices, budget)).label == "auto" and found.share <= plan.share:
        budget *= NOTCH
    return found


def apply_plan(unet: nn.Module, plan: Plan) -> None:
    """Recompute what the plan says and nothing else; any number of times, whatever forwards modules have been given.

    Args:
        unet: A diffusers U-Net, not wrapped for several processes.
        plan: From ``choose``, or made by hand.
    """
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
    def __init__(self, forward: Callable[..., Any], is_own: bool) -> None:
        self.forward, self.is_own = forward, is_own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


@dataclass(frozen=True)
class _Step(Price):
    block: str = ""
    """Choices for the same block exclude each other; the later one replaces the earlier."""


def _steps(units: Sequence[Price]) -> list[_Step]:
    """All choices, best first, those of resnets last; each is priced as what it adds to the one it replaces."""
    inner = {unit.name.rpartition(".")[0]: unit for unit in units if unit.kind == FEED_FORWARD}
    blocks = {unit.name for unit in units if unit.kind == BLOCK}
    steps = [_Step(**vars(unit), block=name) for name, unit in inner.items() if name not in blocks]
    for unit in units:
        part = inner.get(unit.name) if unit.kind == BLOCK else None
        rest = part and replace(
            unit, freed_bytes=unit.freed_bytes - part.freed_bytes, seconds=unit.seconds - part.seconds
        )
        if part and rest and _rate(part) > _rate(rest):
            steps += [_Step(**vars(part), block=unit.name), _Step(**vars(rest), block=unit.name)]
        elif unit.kind != FEED_FORWARD:
            steps.append(_Step(**vars(unit), block=unit.name))
    steps = [step for step in steps if step.freed_bytes > 0]
    return sorted(steps, key=lambda step: (step.kind == RESNET, -_rate(step), step.name))


def _rate(price: Price) -> float:
    return price.freed_bytes / max(price.seconds, 1e-12)


def _slack(units: Sequence[Price]) -> int:
    return max((unit.freed_bytes for unit in units), default=0)
