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
from lora_utils.memory.operators import NO_WORK, Work
from lora_utils.memory.planning import plan_step
from lora_utils.memory.unet_footprint import StepShape, sampling_footprint, training_footprint
from lora_utils.model import architectures
from lora_utils.system.device import DTYPES
from lora_utils.system.units import GIB

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
        works = [self.work] if self.exact_work is None else [self.work, self.exact_work]
        times = [card.seconds(work.flops, work.streamed_bytes, work.kernels) for work in works]
        return sum(times[:1]) + FP32_SLOWDOWN * sum(times[1:])


def forecast(job: Job, cap_gib: float) -> dict[str, Any]:
    """Peak in GiB, kernels, seconds on a T4 and whether it fits a card on which torch can reserve so much.

    Nothing of what is measured by the clock alone.
    """
    budget_gib = cap_gib - WORKSPACE_GIB
    counted = count(job, budget_gib)
    if counted is None:
        return {}
    return {
        "allocated_gib": counted.peak_bytes / GIB,
        "reserved_gib": counted.reserved_bytes / GIB,
        "needed_gib": counted.needed_bytes / GIB,
        "fits": counted.needed_bytes <= budget_gib * GIB,
        "kernels": counted.work.kernels + (counted.exact_work.kernels if counted.exact_work else 0),
        "tflop": counted.work.tflop + (counted.exact_work.tflop if counted.exact_work else 0),
        "t4_seconds": counted.seconds(T4),
        **(
            {"plan": counted.plan, "recomputes": str(counted.plan), "share": counted.plan.share}
            if counted.plan
            else {}
        ),
    }


def count(job: Job, budget_gib: float) -> Counted | None:
    """Simulate it; plans are made for the budget."""
    if isinstance(job, Stage):
        # Of fp32 the whole work is slower than the card's rates, which are half precision's.
        footprint = _stage_footprint(job)
        if footprint and job.dtype == "fp32":
            return replace(_counted(footprint), work=NO_WORK, exact_work=footprint.work)
        return _counted(footprint) if footprint else None
    if job.way != "ours":
        return _count_peer(job)
    planned = plan_step(training_shape(job), T4, budget_gib, job.plan)
    return replace(_counted(planned.planned), plan=planned.plan)


def _counted(footprint: Footprint) -> Counted:
    return Counted(footprint.peak_bytes, footprint.reserved_bytes, footprint.needed_bytes, footprint.work)


def training_shape(case: Case) -> StepShape:
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
        is_lean="peft" not in case.options,
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
    training = Counted(peak, reserved, needed, simulation.work())
    if not peer.encodes:
        return training
    encoding = cached_on_disk(encoding_footprint, architectures.VAE, size, case.batch, DTYPES["fp32"], None)
    at_rest = simulation.phases[""] - encoding.resident_bytes["base"]  # the VAE is resident already
    return Counted(
        max(training.peak_bytes, at_rest + encoding.peak_bytes),
        max(reserved, at_rest + encoding.reserved_bytes),
        max(needed, at_rest + encoding.needed_bytes),
        training.work,
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
        shape = replace(training_shape(Case("sampling")), size_px=size)
        return sampling_footprint(shape, stage.batch, cached_on_disk(training_footprint, shape))
    return None
