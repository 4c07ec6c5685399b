"""What the processes of ``gpu`` do. Importing this takes seconds: it brings along all that a job needs."""

import time
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu import checks, forecasts, nodes, runs, stages, trainings
from benchmarks.gpu.cases import T4_GIB, Case, Job, Stage
from benchmarks.gpu.device import MESSAGE_LENGTH, Settings, attention, facts, measure, peaks, prepare
from benchmarks.gpu.micro import micro
from benchmarks.gpu.peers import our_step, peer_step
from benchmarks.gpu.smoke import Check
from lora_utils.memory.gradient_checkpointing import Plan
from lora_utils.memory.simulation import SimulationError
from lora_utils.model import architectures
from lora_utils.system.determinism import deterministic_algorithms
from lora_utils.system.device_memory import free_memory

SMALL_UNET = {
    "block_out_channels": [32, 32, 64],
    "attention_head_dim": [1, 1, 2],
    "transformer_layers_per_block": 1,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
SMALL_VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1}
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def answer(settings: dict[str, Any], function: str, *arguments: Any) -> dict[str, Any]:
    """Prepare the device, do one job, and say how it ended, with the seconds of the job alone."""
    started = time.monotonic()
    prepared = _settings(settings)
    if function != "describe":
        prepare(prepared)
    try:
        with deterministic_algorithms(prepared.deterministic), attention(prepared):
            found = FUNCTIONS[function](prepared, *arguments)
        return {"status": "ok"} | found | {"seconds": round(time.monotonic() - started, 1)}
    except torch.OutOfMemoryError as error:
        return {"status": "out of memory", "message": str(error)[:MESSAGE_LENGTH], **peaks()}


def forecast(settings: dict[str, Any], job: Job, cap_gib: float) -> dict[str, Any]:
    """Of one job; see ``forecasts``."""
    _settings(settings)
    return forecasts.forecast(job, cap_gib)


def _settings(settings: dict[str, Any]) -> Settings:
    parsed = Settings(**settings)
    if parsed.rehearse:  # in place: the shapes are read wherever a model is built or counted
        architectures.UNET.update(SMALL_UNET)
        architectures.VAE.update(SMALL_VAE)
        architectures.TEXT_ENCODER.update(SMALL_TEXT)
        architectures.TEXT_ENCODER_2.update(SMALL_TEXT)
    return parsed


def _describe(settings: Settings) -> dict[str, Any]:
    """The card, and how much of it torch can have."""
    return {"gpu": None} if settings.rehearse else {"gpu": record.gpu_facts(), **facts()}


def _case(settings: Settings, case: Case) -> dict[str, Any]:
    """Steps of one way; the loss tells that they compute something."""
    if case.way != "ours":
        step = peer_step(case, settings.device)
        return measure(step, settings) | {"loss": float(step())}
    plan, figures = _planned(settings, case)
    step = our_step(case, plan, settings.device)
    return figures | measure(step, settings) | {"loss": float(step())}


def _planned(settings: Settings, case: Case) -> tuple[Plan, dict[str, Any]]:
    """What it recomputes, and its forecast where a plan for the memory that is here needs one."""
    if case.plan != "auto":
        return Plan((), case.plan), {}
    cap_gib = settings.vram_gib or facts()["usable_gib"] or T4_GIB
    try:
        forecast = forecasts.forecast(case, cap_gib)
    except SimulationError as error:  # of a torch that cannot be simulated: then it takes what it takes
        return Plan((), "none"), {"forecast": {}, "message": str(error)[:MESSAGE_LENGTH]}
    return forecast.pop("plan"), {"forecast": forecast}


def _stage(settings: Settings, stage: Stage) -> dict[str, Any]:
    """Any other job."""
    module = checks if stage.function.startswith("check_") else stages
    return getattr(module, stage.function)(stage, settings)


def _check(settings: Settings, check: Check) -> dict[str, Any]:
    """One of the short checks; the one before it may have left a U-Net to Python's collector."""
    free_memory()
    return CHECKS[check.function](check, settings)


CHECKS = {
    "facts": trainings.card_facts,
    "nodes": nodes.errors,
    "training": trainings.training,
    "resumed": trainings.resumed,
    "compare": trainings.compare,
    "left behind": trainings.left_behind,
    "full card": trainings.full_card,
    "step": checks.sdxl_step,
    "run": runs.whole_run,
}
FUNCTIONS = {"describe": _describe, "case": _case, "stage": _stage, "micro": micro, "check": _check}
