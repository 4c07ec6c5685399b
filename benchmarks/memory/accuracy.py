"""Forecast against torch's own CPU allocator, on an SDXL-shaped U-Net of 52 M parameters that really runs."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from lora_utils.config.training import LoraConfig
from lora_utils.memory.cards import T4
from lora_utils.memory.gradient_checkpointing import RECOMPUTABLE, Plan, Price, Prices, apply_plan, choose
from lora_utils.memory.simulation import META, Simulation
from lora_utils.model import architectures
from lora_utils.model.lean import make_lean
from lora_utils.model.lora import add_lora

MIDDLE = architectures.UNET | {
    "block_out_channels": [64, 128, 256],
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 4],
    "cross_attention_dim": 256,
    "projection_class_embeddings_input_dim": 1536 + 64,
}
SETTINGS = [
    *(
        (way, label, 2, side)
        for way in ("lean", "peft")
        for label in ("none", "auto", "full")
        for side in (32, 64)
    ),
    ("lean", "none", 4, 48),
    ("lean", "full", 4, 48),
]


def measure(config: dict[str, Any] = MIDDLE, settings: Iterable[tuple] = SETTINGS) -> list[dict[str, Any]]:
    """Peak bytes of forward and backward, beside weights, adapters and their copies: real and simulated."""
    rows = []
    for way, label, batch, side in settings:
        plan = _plan(config, way, label, batch, side)
        real = _real_peak(_unet(config, torch.device("cpu")), way, plan, batch, side)
        simulated = _simulated_peak(_unet(config, META), way, plan, batch, side)
        error = 100 * (simulated / real - 1)
        rows.append(
            {
                "step": way,
                "recompute": label,
                "batch": batch,
                "latent": side,
                "real_mib": round(real / 2**20, 2),
                "simulated_mib": round(simulated / 2**20, 2),
                "error_percent": round(error, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def _unet(config: dict[str, Any], device: torch.device) -> UNet2DConditionModel:
    with device:
        unet = UNet2DConditionModel(**config).train()
    add_lora(unet, LoraConfig(rank=8, target_modules=["attn"]), seed=0)
    return unet


def _forward_and_backward(unet: UNet2DConditionModel, batch: int, side: int, device: torch.device) -> None:
    config = unet.config
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    latents = torch.zeros(batch, 4, side, side, device=device)
    conditioning = {
        "timestep": torch.zeros(batch, dtype=torch.long, device=device),
        "encoder_hidden_states": torch.zeros(batch, 77, config["cross_attention_dim"], device=device),
        "added_cond_kwargs": {
            "text_embeds": torch.zeros(batch, pooled, device=device),
            "time_ids": torch.zeros(batch, 6, device=device),
        },
    }
    prediction = unet(latents, return_dict=False, **conditioning)[0]
    functional.mse_loss(prediction, latents).backward()


def _plan(config: dict[str, Any], way: str, label: str, batch: int, side: int) -> Plan:
    """For auto, what frees half of the activations."""
    if label != "auto":
        return Plan((), label)
    unet = _unet(config, META)
    simulation = Simulation()
    _prepare(unet, way, Plan())
    for name, module in unet.named_modules():
        if type(module).__name__ in RECOMPUTABLE:
            simulation.watch(name, module)
    prices: list[Price] = []

    def price(module: torch.nn.Module, args: Any, output: Any) -> None:
        for name, unit in simulation.units().items():
            seconds = T4.seconds(unit.work.flops, unit.work.streamed_bytes, 0)
            prices.append(Price(name, type(unet.get_submodule(name)).__name__, unit.freed_bytes, seconds))

    unet.register_forward_hook(price)
    with simulation:
        _forward_and_backward(unet, batch, side, META)
    return choose(Prices(simulation.peak_bytes, tuple(prices)), simulation.peak_bytes / 2)


def _prepare(unet: UNet2DConditionModel, way: str, plan: Plan) -> None:
    if way == "lean":
        make_lean(unet)
    apply_plan(unet, plan)


def _simulated_peak(unet: UNet2DConditionModel, way: str, plan: Plan, batch: int, side: int) -> int:
    simulation = Simulation()
    with simulation:
        simulation.hold([*unet.parameters(), *unet.buffers()])
        _prepare(unet, way, plan)
        before = simulation.live_bytes
        _forward_and_backward(unet, batch, side, META)
    return simulation.peak_bytes - before


def _real_peak(unet: UNet2DConditionModel, way: str, plan: Plan, batch: int, side: int) -> int:
    _prepare(unet, way, plan)
    _forward_and_backward(unet, batch, side, torch.device("cpu"))
    for parameter in unet.parameters():
        parameter.grad = None
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _forward_and_backward(unet, batch, side, torch.device("cpu"))
    events = [(event.start_time_ns, event.extra_fields.alloc_size) for event in _memory_events(profiler)]
    live = peak = 0
    for _, size in sorted(events):
        live += size
        peak = max(peak, live)
    return peak


def _memory_events(profiler: Any) -> Iterable[Any]:
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if str(event.name) == "[memory]":
            yield event
