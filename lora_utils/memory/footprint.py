"""Keeps footprints on disk: counting SDXL takes seconds, and depends on shapes and versions alone."""

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_utils.config.section import Size
from lora_utils.memory.allocator import least_limit, replay
from lora_utils.memory.operators import META, Work
from lora_utils.memory.simulation import Simulation, Unit, on_meta
from lora_utils.model.vae import tile_vae
from lora_utils.system.files import write_atomically
from lora_utils.system.versions import versions


@dataclass(frozen=True)
class Footprint:
    """What a run of something needs."""

    peak_bytes: int
    """Most that tensors take at a time."""
    reserved_bytes: int
    """Most that torch's allocator takes for that from a card that is large enough."""
    needed_bytes: int
    """Least with which it still runs, torch giving empty blocks back whenever the card is full."""
    held_bytes: dict[str, int]
    """What is there before and after: base, adapter, gradients, optimiser."""
    phases: dict[str, int]
    """Peak of each."""
    work: Work
    forward: Work
    """Of work, what the forward pass does."""
    units: dict[str, tuple[str, Unit]] = field(default_factory=dict)
    """Of modules that could be recomputed: class and what that would free and cost."""
    weights: int = 0
    """Numbers in the base model's files."""
    trainable: int = 0
    """Parameters that learn."""


def encoding_footprint(
    vae_config: dict[str, Any], size_px: Size, batch: int, dtype: torch.dtype, tile_px: int | None = None
) -> Footprint:
    """Images of one size through the VAE's encoder."""
    return _vae_footprint(vae_config, dtype, tile_px, (batch, 3, size_px[1], size_px[0]), "encode")


def decoding_footprint(
    vae_config: dict[str, Any], size_px: Size, dtype: torch.dtype, tile_px: int | None = None
) -> Footprint:
    """One image out of the VAE's decoder."""
    scale = 2 ** (len(vae_config["block_out_channels"]) - 1)
    shape = (1, vae_config.get("latent_channels", 4), size_px[1] // scale, size_px[0] // scale)
    return _vae_footprint(vae_config, dtype, tile_px, shape, "decode")


def captions_footprint(configs: Iterable[dict[str, Any]], rows: int, dtype: torch.dtype) -> Footprint:
    """Rows of 77 tokens through both text encoders, which are loaded together."""
    first, second = configs
    with on_meta(dtype):
        encoders = nn.ModuleList(
            [
                CLIPTextModel(CLIPTextConfig.from_dict(first)),
                CLIPTextModelWithProjection(CLIPTextConfig.from_dict(second)),
            ]
        ).eval()
    encoders.requires_grad_(False)
    simulation, held = Simulation(), {}
    with simulation, torch.no_grad():
        held["base"] = held_by(
            simulation, lambda: simulation.hold([*encoders.parameters(), *encoders.buffers()])
        )
        ids = torch.zeros(rows, first.get("max_position_embeddings", 77), dtype=torch.long, device=META)
        simulation.start("forward")
        for encoder in encoders:
            encoder(ids, output_hidden_states=True)
    return footprint_of(simulation, held, encoders)


def _vae_footprint(
    vae_config: dict[str, Any], dtype: torch.dtype, tile_px: int | None, shape: tuple[int, ...], method: str
) -> Footprint:
    with on_meta(dtype):
        vae = cast(AutoencoderKL, AutoencoderKL.from_config(vae_config)).eval().requires_grad_(False)
    tile_vae(vae, tile_px)
    simulation, held = Simulation(), {}
    with simulation, torch.no_grad():
        held["base"] = held_by(simulation, lambda: simulation.hold([*vae.parameters(), *vae.buffers()]))
        seen = torch.empty(shape, dtype=dtype, device=META)
        simulation.start("forward")
        getattr(vae, method)(seen)
    return footprint_of(simulation, held, vae)


def held_by(simulation: Simulation, make: Callable[[], object]) -> int:
    """Bytes that are live afterwards and were not before."""
    before = simulation.live_bytes
    make()
    return simulation.live_bytes - before


def footprint_of(
    simulation: Simulation,
    held: dict[str, int],
    model: nn.Module,
    first: int = 0,
    middle: int | None = None,
    units: dict[str, tuple[str, Unit]] | None = None,
) -> Footprint:
    """What a simulation counted, from its first operator on; the forward pass ends at the middle one."""
    work, forward = simulation.work(first), simulation.work(first, middle)
    peak, reserved = simulation.peak_bytes, replay(simulation.trace)
    needed = least_limit(simulation.trace, peak, reserved)
    return Footprint(
        peak, reserved, needed, held, simulation.phases, work, forward, units or {}, *counts_of(model)
    )


def counts_of(model: nn.Module) -> tuple[int, int]:
    """Numbers that are frozen, and that learn."""
    parameters = list(model.parameters())
    trainable = sum(one.numel() for one in parameters if one.requires_grad)
    return sum(one.numel() for one in parameters) - trainable, trainable


FORMAT = TypeAdapter(Footprint)
PACKAGES = ["torch", "diffusers", "transformers", "peft"]


def cached_on_disk(function: Callable[..., Footprint], *args: Any, folder: Path | None = None) -> Footprint:
    """The function's result, from disk where it was counted before with the same versions and code.

    Args:
        function: One of ``footprints`` or ``steps``.
        args: All that decides its result, by their ``repr``.
        folder: Where results are kept; ~/.cache when not given.
    """
    content = repr((function.__name__, args, versions(PACKAGES), _code()))
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    file = (folder or home / "lora_utils") / "forecasts" / f"{name}.json"
    with suppress(OSError, ValidationError):
        return FORMAT.validate_json(file.read_bytes())
    found = function(*args)
    with suppress(OSError):  # a full or read-only disk costs some seconds the next time
        write_atomically(file, FORMAT.dump_json(found))
    return found


def _code() -> str:
    """Hash of the modules that a footprint depends on, so that editing one forgets what it counted."""
    rooms = (Path(__file__).parents[1] / room for room in ("memory", "model"))
    files = sorted(file for room in rooms for file in room.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
