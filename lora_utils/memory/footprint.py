"""What running a model takes, counted by a simulation: of the VAE and the text encoders here, kept on disk.

Counting SDXL takes seconds, and depends on shapes and versions alone: ``cached_on_disk`` remembers the
results.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from lora_utils.config.section import Size
from lora_utils.memory.allocator import least_limit, replay
from lora_utils.memory.operators import META, Convolution, Work
from lora_utils.memory.simulation import Simulation, Unit, on_meta, require_support
from lora_utils.model.quantisation import LeftInFull
from lora_utils.model.vae import tile_vae
from lora_utils.system.collector import collector_paused
from lora_utils.system.files import write_atomically
from lora_utils.system.versions import versions

PACKAGES = ["torch", "diffusers", "transformers", "peft"]  # whose graphs and layouts a footprint counts
ROOMS = ("memory", "model")  # whose code decides what is counted
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Footprint:
    """What a run of something needs."""

    peak_bytes: int
    """Most that tensors take at a time."""
    reserved_bytes: int
    """Most that torch's allocator takes for that from a card that is large enough."""
    needed_bytes: int
    """Least with which it still runs, torch giving empty blocks back whenever the card is full."""
    resident_bytes: dict[str, int]
    """What is there before and after: base, adapter, gradients, optimizer."""
    phases: dict[str, int]
    """Peak of each phase, in bytes."""
    work: Work
    forward: Work
    """Of work, what the forward pass does."""
    units: dict[str, tuple[str, Unit]] = field(default_factory=dict)
    """Of modules that could be recomputed: class and what that would free and cost."""
    weights: int = 0
    """Numbers in the base model's files."""
    trainable: int = 0
    """Parameters that learn."""
    left_in_full: LeftInFull | None = None
    """What of the base stays in full although it was to be quantised."""
    convolutions: tuple[Convolution, ...] = ()
    """The different ones among its operators, for ``workspaces``."""


FORMAT = TypeAdapter(Footprint)


def encoding_footprint(
    vae_config: dict[str, Any], size_px: Size, batch: int, dtype: torch.dtype, tile_px: int | None = None
) -> Footprint:
    """Images of one size through the VAE's encoder.

    Args:
        vae_config: config.json.
        size_px: Width and height.
        batch: Images at a time.
        dtype: Of the VAE.
        tile_px: Side of the tiles that images are cut into; None for whole images.
    """
    return _vae_footprint(vae_config, dtype, tile_px, (batch, 3, size_px[1], size_px[0]), "encode")


def decoding_footprint(
    vae_config: dict[str, Any], size_px: Size, dtype: torch.dtype, tile_px: int | None = None
) -> Footprint:
    """One image out of the VAE's decoder; arguments as for ``encoding_footprint``."""
    scale = 2 ** (len(vae_config["block_out_channels"]) - 1)
    latent_channels = vae_config.get("latent_channels", 4)
    shape = (1, latent_channels, size_px[1] // scale, size_px[0] // scale)
    return _vae_footprint(vae_config, dtype, tile_px, shape, "decode")


def captions_footprint(configs: Iterable[dict[str, Any]], rows: int, dtype: torch.dtype) -> Footprint:
    """Rows of 77 tokens through both text encoders, which are loaded together.

    Args:
        configs: Both config.json.
        rows: Captions times the chunks of each.
        dtype: Of the encoders.
    """
    # Here, as a count that is on disk needs no transformers.
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # Attention as torch has it: a config.json could name a kernel on the Hub, which would run.
    plain = [
        {name: value for name, value in config.items() if "attn_implementation" not in name}
        for config in configs
    ]
    first, second = (CLIPTextConfig.from_dict(config, attn_implementation="sdpa") for config in plain)
    with on_meta(dtype):
        encoders = nn.ModuleList([CLIPTextModel(first), CLIPTextModelWithProjection(second)]).eval()
    encoders.requires_grad_(False)

    simulation = Simulation()
    with simulation, torch.no_grad():
        base = bytes_added_by(
            simulation, lambda: simulation.hold([*encoders.parameters(), *encoders.buffers()])
        )
        ids = torch.zeros(rows, first.max_position_embeddings, dtype=torch.long, device=META)
        simulation.start("forward")
        for encoder in encoders:
            encoder(ids, output_hidden_states=True)  # SDXL reads the last but one layer, so that all are kept
    return footprint_of(simulation, {"base": base}, encoders)


def _vae_footprint(
    vae_config: dict[str, Any], dtype: torch.dtype, tile_px: int | None, shape: tuple[int, ...], method: str
) -> Footprint:
    from diffusers import AutoencoderKL

    with on_meta(dtype):
        vae = cast(AutoencoderKL, AutoencoderKL.from_config(vae_config)).eval().requires_grad_(False)
    tile_vae(vae, tile_px)
    simulation = Simulation()
    with simulation, torch.no_grad():
        base = bytes_added_by(simulation, lambda: simulation.hold([*vae.parameters(), *vae.buffers()]))
        pixels_or_latents = torch.empty(shape, dtype=dtype, device=META)
        simulation.start("forward")
        getattr(vae, method)(
            pixels_or_latents
        )  # the public method, which cuts tiles where they are turned on
    return footprint_of(simulation, {"base": base}, vae)


def bytes_added_by(simulation: Simulation, action: Callable[[], object]) -> int:
    """Bytes that are live after an action and were not before it."""
    before = simulation.live_bytes
    action()
    return simulation.live_bytes - before


def footprint_of(
    simulation: Simulation,
    resident_bytes: dict[str, int],
    model: nn.Module,
    first: int = 0,
    middle: int | None = None,
    units: dict[str, tuple[str, Unit]] | None = None,
) -> Footprint:
    """What a simulation counted.

    Args:
        simulation: Over; nothing runs any more.
        resident_bytes: What was there before the first operator that counts.
        model: What ran.
        first: The operator from which on work is counted; what came before was preparation.
        middle: The operator with which the forward pass ends; None where there is no other.
        units: Modules that could be recomputed.
    """
    work = simulation.work(first)
    forward = simulation.work(first, middle)
    peak = simulation.peak_bytes
    reserved = replay(simulation.trace)
    needed = least_limit(simulation.trace, peak, reserved)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() for parameter in model.parameters()) - trainable
    return Footprint(
        peak,
        reserved,
        needed,
        resident_bytes,
        simulation.phases,
        work,
        forward,
        units or {},
        weights,
        trainable,
        convolutions=tuple(sorted(simulation.convolutions)),
    )


def cached_on_disk(function: Callable[..., Footprint], *args: Any, folder: Path | None = None) -> Footprint:
    """The function's result, from disk where it was counted before with the same versions and code.

    Args:
        function: One of this module's or of ``unet_footprint``'s, by its name.
        args: All that decides its result, by their ``repr``.
        folder: Where results are kept; ~/.cache when not given.

    Raises:
        SimulationError: It has to be counted, and this version of torch cannot be simulated.
    """
    content = repr((function.__name__, args, versions(PACKAGES), _code()))
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    file = (folder or home / "lora_utils") / "forecasts" / f"{name}.json"
    # Whatever else lies there under this name is counted anew and replaced: a forecast must not fail by its
    # cache.
    with suppress(OSError, ValidationError):
        return FORMAT.validate_json(file.read_bytes())
    require_support()
    with collector_paused():
        footprint = function(*args)
    with suppress(OSError):  # a full or read-only disk costs some seconds the next time
        write_atomically(file, FORMAT.dump_json(footprint))
    return footprint


def _code() -> str:
    """Hash of the modules that a footprint depends on, so that editing one forgets what it counted."""
    files = sorted(file for room in ROOMS for file in (PACKAGE / room).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
