"""What the forecast says of everything that ``gpu`` measures, before it is measured."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu.cases import Case, Job, Stage
from benchmarks.gpu.peers import PEERS, TOKENS
from benchmarks.memory import peer_graphs
from lora_utils.config.training import LoraConfig
from lora_utils.memory.allocator import least_limit
from lora_utils.memory.cards import FP32_SLOWDOWN, T4, WORKSPACE_GIB, Card
from lora_utils.memory.footprint import (
    Footprint,
    cached_on_disk,
    captions_footprint,
    decoding_footprint,
    encoding_footprint,
)
from lora_utils.memory.gradient_checkpointing import Plan
from lora_utils.memory.operators import Work
from lora_utils.memory.planning import plan_step
from lora_utils.memory.unet_footprint import StepShape, sampling_footprint, training_footprint
from lora_utils.model import architectures
from lora_utils.system.device import DTYPES, GIB

NOTHING = Work(0, {}, 0)
STATE_BYTES = {"adamw": 8, "adamw8bit": 2}


@dataclass(frozen=True)
class Counted:
    """What a simulation found."""

    peak_bytes: int
    reserved_bytes: int
    needed_bytes: int
    """The least that torch has to be able to reserve: it gives empty blocks back when the card is full."""
    work: Work
    exact_work: Work | None = None
    """Of work, what runs in fp32."""
    plan: Plan | None = None

    def seconds(self, card: Card) -> float:
        """By the card's roofline."""
        parts = [self.work] if self.exact_work is None else [self.work, self.exact_work]
        times = [card.seconds(part.flops, part.streamed_bytes, part.kernels) for part in parts]
        return sum(times[:1]) + FP32_SLOWDOWN * sum(times[1:])


def forecast(job: Job, cap_gib: float) -> dict[str, Any]:
    """Peak in GiB, kernels, seconds on a T4 and whether it fits a card on which torch can reserve so much.

    Nothing of what is measured by the clock alone.
    """
    budget_gib = cap_gib - WORKSPACE_GIB
    found = count(job, budget_gib)
    if found is None:
        return {}
    return {
        "allocated_gib": found.peak_bytes / GIB,
        "reserved_gib": found.reserved_bytes / GIB,
        "needed_gib": found.needed_bytes / GIB,
        "fits": found.needed_bytes <= budget_gib * GIB,
        "kernels": found.work.kernels + (found.exact_work.kernels if found.exact_work else 0),
        "tflop": found.work.tflop + (found.exact_work.tflop if found.exact_work else 0),
        "t4_seconds": found.seconds(T4),
        **(
            {"plan": found.plan, "recomputes": str(found.plan), "share": found.plan.share}
            if found.plan
            else {}
        ),
    }


def count(job: Job, budget_gib: float) -> Counted | None:
    """Simulate it; plans are made for the budget."""
    if isinstance(job, Stage):
        found = _stage_footprint(job)
        if found and job.dtype == "fp32":
            return replace(_counted(found), work=NOTHING, exact_work=found.work)
        return _counted(found) if found else None
    if job.way != "ours":
        return _count_peer(job)
    planned = plan_step(training_step(job), T4, budget_gib, job.plan)
    return replace(_counted(planned.planned), plan=planned.plan)


def _counted(found: Footprint) -> Counted:
    return Counted(found.peak_bytes, found.reserved_bytes, found.needed_bytes, found.work)


def training_step(case: Case) -> StepShape:
    """Of ours."""
    return StepShape(
        architectures.UNET,
        LoraConfig(rank=case.rank, target_modules=[case.targets]),
        "fp16",
        "plain" if case.base == "fp16" else case.base,
        case.optimizer,
        case.batch,
        (case.side_px, case.side_px),
        TOKENS,
    )


def _count_peer(case: Case) -> Counted:
    peer = PEERS[case.way]
    size = (case.side_px, case.side_px)
    graph = peer_graphs.Graph(
        lora=peer.adapter,
        autocast=True,
        recompute=peer.recompute,
        targets=peer_graphs.ALL if case.targets == "attn+ff" else peer_graphs.ATTENTION,
        rank=case.rank,
        batch=case.batch,
        side_px=case.side_px,
        state_bytes=STATE_BYTES[case.optimizer],
        resident=peer.resident,
    )
    simulation, reserved = peer_graphs.count(graph)
    peak = simulation.peak_bytes
    needed = least_limit(simulation.trace, peak, reserved)
    found = Counted(peak, reserved, needed, simulation.work())
    if not peer.encodes:
        return found
    encoding = cached_on_disk(encoding_footprint, architectures.VAE, size, case.batch, DTYPES["fp32"], None)
    at_rest = simulation.phases[""] - encoding.resident_bytes["base"]  # the VAE is resident already
    return Counted(
        max(found.peak_bytes, at_rest + encoding.peak_bytes),
        max(reserved, at_rest + encoding.reserved_bytes),
        max(needed, at_rest + encoding.needed_bytes),
        found.work,
        encoding.work,
    )


def _stage_footprint(stage: Stage) -> Footprint | None:
    size = (stage.side_px, stage.side_px)
    dtype = DTYPES[stage.dtype]
    if stage.function == "vae_encode":
        return cached_on_disk(encoding_footprint, architectures.VAE, size, stage.batch, dtype, stage.tile_px)
    if stage.function == "vae_decode":
        return cached_on_disk(decoding_footprint, architectures.VAE, size, dtype, None)
    if stage.function == "captions":
        return cached_on_disk(
            captions_footprint, (architectures.TEXT_ENCODER, architectures.TEXT_ENCODER_2), stage.batch, dtype
        )
    if stage.function == "sampling":
        step = replace(training_step(Case("sampling")), size_px=size)
        return sampling_footprint(step, stage.batch, cached_on_disk(training_footprint, step))
    return None
