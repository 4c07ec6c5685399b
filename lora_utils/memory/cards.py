"""Graphics cards: what they hold, and how fast they compute.

A step's time is a roofline: operations over the rate of their class, plus all that is read and written over
0.81 of the memory's bandwidth. Of the T4, 24 TFLOPS for products of 4096 x 4096 were measured by others
(NVIDIA's forum, 264462: the 70 W cap), which is 26 without their memory traffic; its other rates are fitted
to a published roofline of SDXL's step. The remaining cards' rates are shares of their data sheets.
``card_here`` measures instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_utils import UserError
from lora_utils.system.units import GIB

if TYPE_CHECKING:
    import torch

CONTEXT_GIB = 0.35  # CUDA itself, cuBLAS and cuDNN with the kernels that they load
WORKSPACE_GIB = 0.2  # handles of the backward pass' thread, and kernels that are loaded late
FP32_SLOWDOWN = 3.0  # of convolutions, against the rates here, which are half precision's: a T4 does 5 TFLOPS
STREAMED_SHARE = 0.81  # of the data sheet's bandwidth that is reached


class CardError(UserError):
    """A card is not known."""


@dataclass(frozen=True)
class Card:
    """A device to forecast for."""

    name: str
    total_gib: float
    usable_gib: float
    """What torch can reserve: the total without CUDA's context and workspaces."""
    compute_capability: tuple[int, int] | None
    """None of a CPU."""
    gemm_tflops: float
    conv_tflops: float
    attention_tflops: float
    bandwidth_gbs: float
    """Of the data sheet."""
    launch_us: float = 8.0
    """From one kernel to the next, as Python and the driver launch them."""
    is_measured: bool = False
    """The rates were measured here."""

    @property
    def is_gpu(self) -> bool:
        """Else it is the CPU that is here."""
        return self.compute_capability is not None

    def headline(self, budget_gib: float, assumes_sdxl: bool) -> str:
        """The first line of a forecast.

        Args:
            budget_gib: What training may take.
            assumes_sdxl: The base model's shapes are not here yet.
        """
        memory = "" if self.is_gpu else " of RAM"
        line = f"{self.name}: {budget_gib:.1f} of {self.total_gib:.1f} GiB{memory} can be used"
        if assumes_sdxl:
            line += "; SDXL's own shapes are taken, the base model's config is not here yet"
        return line

    def seconds(self, flops: Mapping[str, float], streamed_bytes: float, kernels: int) -> float:
        """Of some work.

        Args:
            flops: Operations of the classes gemm, conv and attention.
            streamed_bytes: Read and written.
            kernels: Launched.
        """
        rates = {"gemm": self.gemm_tflops, "conv": self.conv_tflops, "attention": self.attention_tflops}
        computing = sum(amount / (rates[operation] * 1e12) for operation, amount in flops.items())
        streaming = streamed_bytes / (STREAMED_SHARE * self.bandwidth_gbs * 1e9)
        # Launching runs ahead of the card: it counts only where it is what the card waits for.
        return max(computing + streaming, kernels * self.launch_us / 1e6)


def _card(
    name: str, total_gib: float, capability: tuple[int, int], tensor_tflops: float, bandwidth_gbs: float
) -> Card:
    """Rates as shares of the data sheet's fp16 tensor peak, as a published A100 roofline implies them."""
    return Card(
        name,
        total_gib,
        round(total_gib - CONTEXT_GIB - WORKSPACE_GIB, 2),
        capability,
        gemm_tflops=0.6 * tensor_tflops,
        conv_tflops=0.5 * tensor_tflops,
        attention_tflops=0.35 * tensor_tflops,
        bandwidth_gbs=bandwidth_gbs,
    )


def _sized(size_gb: int) -> Card:
    """Some card of this size, as fast as a T4."""
    total_gib = size_gb * 0.985
    return Card(
        f"{size_gb}gb",
        total_gib,
        round(total_gib - CONTEXT_GIB - WORKSPACE_GIB, 2),
        (7, 5),
        T4.gemm_tflops,
        T4.conv_tflops,
        T4.attention_tflops,
        T4.bandwidth_gbs,
    )


T4 = Card("t4", 14.75, 14.3, (7, 5), 26.0, 28.9, 10.9, 320)
CARDS = {
    card.name: card
    for card in (
        T4,
        _card("l4", 22.0, (8, 9), 121, 300),
        _card("a100", 39.4, (8, 0), 312, 1555),
        _card("a100-80gb", 79.1, (8, 0), 312, 2039),
        _card("h100", 79.1, (9, 0), 989, 3350),
        _card("h200", 139.8, (9, 0), 989, 4800),
        _card("v100", 15.77, (7, 0), 112, 900),
        _card("p100", 15.9, (6, 0), 18.7, 732),
        _card("rtx3060", 11.76, (8, 6), 51, 360),
        _card("rtx3090", 23.69, (8, 6), 142, 936),
        _card("rtx4060ti", 15.6, (8, 9), 88, 288),
        _card("rtx4070", 11.72, (8, 9), 117, 504),
        _card("rtx4090", 23.52, (8, 9), 330, 1008),
        _card("rtx5090", 31.36, (12, 0), 419, 1792),
        *(_sized(size_gb) for size_gb in (4, 6, 8, 10, 12, 16, 24)),
    )
}


def find_card(name: str) -> Card:
    """A card by name.

    Raises:
        CardError: There is none of this name.
    """
    key = name.lower().removeprefix("nvidia ").replace(" ", "")
    if key not in CARDS:
        raise CardError(f"no card is called '{name}'; choose one of {', '.join(CARDS)}")
    return CARDS[key]


def card_here(dtype: "torch.dtype") -> Card:
    """The GPU here, or the CPU: what is free, and rates from a second of measuring in this precision."""
    # Here, as a card that is only asked about by its name needs neither.
    import psutil
    import torch

    from lora_utils.memory.rates import measure_rates

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gemm, conv, attention, copying = measure_rates(device, dtype)
    rates = gemm, conv, attention, copying / STREAMED_SHARE
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        # Nothing is launched on a CPU: the operators' own time is all there is.
        return Card("cpu", memory.total / GIB, memory.available / GIB, None, *rates, 0.0, is_measured=True)

    free, total = torch.cuda.mem_get_info()
    # The context is there already; blocks that torch holds and no tensor is in are as good as free ones.
    empty = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    usable = (free + empty) / GIB - WORKSPACE_GIB
    properties = torch.cuda.get_device_properties(0)
    capability = properties.major, properties.minor
    return Card(properties.name, total / GIB, usable, capability, *rates, is_measured=True)
