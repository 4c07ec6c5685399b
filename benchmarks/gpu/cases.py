"""Steps and stages that ``gpu`` measures, by importance; without heavy imports."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

BATCHES = (1, 2, 3, 4, 6, 8, 10, 12, 16)
SIDES_PX = (512, 768, 1024, 1280, 1536, 1792, 2048)
T4_GIB = 14.3  # what torch can reserve there
REHEARSED_SHARE = 16  # a rehearsal's pictures have a 16th of the side


@dataclass(frozen=True)
class Case:
    """One way to train, in a process of its own."""

    name: str
    way: str = "ours"
    """ours, or one of ``peers.PEERS``."""
    plan: Literal["auto", "none", "full"] = "auto"
    """What ours recomputes."""
    base: Literal["fp16", "int8", "nf4"] = "fp16"
    targets: Literal["attn", "attn+ff", "full"] = "attn"
    """Attention's alone are those of the example script; full is the default."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    rank: int = 32
    batch: int = 1
    side_px: int = 1024
    options: tuple[str, ...] = ()
    """peft: without the lean step; channels_last and compile, on top of it; deterministic: torch's such
    algorithms; graph: a micro-batch is one CUDA graph.
    """


@dataclass(frozen=True)
class Stage:
    """Anything else, by the name of a function in ``stages`` or ``checks``."""

    name: str
    function: str
    side_px: int = 1024
    batch: int = 1
    dtype: Literal["fp32", "fp16"] = "fp32"
    tile_px: int | None = None


Job = Case | Stage


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """Of its record."""
        ...


AnyJob = TypeVar("AnyJob", bound=Named)

# In this order: where the minutes run out, the end is left out.
CORE: list[Job] = [
    Case("ours"),
    Case("ours, all recomputed", plan="full"),
    Case("example script", "script"),
    Case("ours, 771 layers", targets="full"),
    Case("ours, nf4", base="nf4", targets="full"),
    Case("ours, low memory", plan="full", base="nf4", targets="full", optimizer="adamw8bit", rank=8),
    Case("sd-scripts", "sd-scripts", targets="attn+ff"),
    Case("ours, 722 linears", targets="attn+ff"),
    Case("ours, int8", base="int8", targets="full"),
    Case("ours, deterministic", options=("deterministic",)),
    Case("ours, a CUDA graph", options=("graph",)),
    Case("ours, peft's way", options=("peft",)),
    Case("ours, batch 2", batch=2),
    Stage("vae encode", "vae_encode"),
    Stage("gradients", "check_gradients", dtype="fp16"),
    Stage("losses", "check_losses", dtype="fp16"),
]
REST: list[Job] = [
    Case("example script, cached latents", "script, cached"),
    Case("OneTrainer", "OneTrainer", targets="attn+ff"),
    Case("ours, 771 layers, all recomputed", plan="full", targets="full"),
    Case("ours, nothing recomputed", plan="none"),
    Case("ours, nf4, batch 4", base="nf4", batch=4),
    Case("example script, nothing recomputed", "script, no recomputation"),
    Stage("vae encode, tiles", "vae_encode", tile_px=512),
    Stage("vae encode, fp16", "vae_encode", dtype="fp16"),
    Stage("captions", "captions", batch=16, dtype="fp16"),
    Stage("sampling", "sampling", batch=2, dtype="fp16"),
    Stage("vae decode", "vae_decode"),
    Stage("save and load", "save_and_load", dtype="fp16"),
    Case("ours, 512 px", side_px=512),
    Case("ours, 768 px", side_px=768),
    Case("ours, 1280 px", side_px=1280),
    Case("ours, 1536 px", side_px=1536),
    Case("ours, nf4, 1536 px", base="nf4", targets="full", side_px=1536),
    Case("ours, batch 4", batch=4),
    Case("ours, batch 6", batch=6),
    Case("ours, 8-bit Adam", targets="full", optimizer="adamw8bit"),
    Case("ours, batch 2, all recomputed", plan="full", batch=2),
    Case("ours, nf4, batch 4, all recomputed", plan="full", base="nf4", batch=4),
    Case("ours, peft's way, channels_last", options=("peft", "channels_last")),
    Case("ours, peft's way, compiled", options=("peft", "compile")),
]


def named(jobs: Sequence[AnyJob], only: Sequence[str]) -> list[AnyJob]:
    """Those of the given names, or else whose names hold one of the given texts; all, where none is given.

    Raises:
        SystemExit: There is none.
    """
    matching = [job for job in jobs if job.name in only]
    matching = matching or [job for job in jobs if not only or any(text in job.name for text in only)]
    if not matching:
        raise SystemExit(
            f"no case is called {' or '.join(only)}; there are: {'; '.join(job.name for job in jobs)}"
        )
    return matching


def rehearsed(jobs: list[Job]) -> list[Job]:
    """The same on small pictures; those that then differ by their names alone are left out."""
    kept: dict[Job, Job] = {}
    for job in jobs:
        smaller = replace(job, side_px=1024 // REHEARSED_SHARE, batch=min(job.batch, 2))
        if isinstance(smaller, Stage) and smaller.tile_px:
            smaller = replace(smaller, tile_px=smaller.tile_px // REHEARSED_SHARE)
        kept.setdefault(replace(smaller, name=""), smaller)
    return list(kept.values())


def cap_grid(share: int) -> list[Case]:
    """Batches and pictures that are tried under caps, all recomputed: what does not fit so does not fit.

    Args:
        share: Sides are divided by it.
    """
    grid: list[Case] = []
    for base in ("fp16", "nf4"):
        whole = Case(base, plan="full", base=base, side_px=1024 // share)
        grid += [replace(whole, name=f"{base}, batch", batch=batch) for batch in BATCHES]
        grid += [replace(whole, name=f"{base}, side", side_px=side // share) for side in SIDES_PX]
    return grid


def largest(
    grid: list[Case], forecasts: list[dict[str, Any]], cap_gib: float, spare_gib: float
) -> list[Case]:
    """Of each kind, the largest that fits with everything recomputed; to be planned anew."""
    fitting: dict[str, Case] = {}
    for case, forecast in zip(grid, forecasts, strict=True):
        if forecast and forecast["needed_gib"] <= cap_gib - spare_gib:
            fitting[case.name] = replace(case, plan="auto")  # they are in order of size
    return list(fitting.values())


PREDICTION = "predicted_step_seconds"
RATE_SECONDS = {
    "launch_us": 2,
    "gemm": 4,
    "conv": 7,
    "attention": 6,
    "stream": 4,
    "unpack": 2,
    "int8_gemm": 7,
    "flash_attn_turing": 5,
    "comfy_kitchen": 5,
    "sustained": 10,
    PREDICTION: 20,
}
"""What ``--micro`` measures, in this order, and seconds of each on any card: it repeats what is short."""
