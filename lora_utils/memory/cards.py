"""Graphics cards: what they hold, and how fast they compute.

A step's time is a roofline: operations over the rate of their class, plus all that is read and written over
0.81 of the memory's bandwidth. Of the T4, 24 TFLOPS for products of 4096 x 4096 were measured by others
(NVIDIA's forum, 264462: the 70 W cap), which is 26 without their memory traffic; its other rates are fitted
to a published roofline of SDXL's step. The remaining cards' rates are shares of their data sheets.
``card_here`` measures instead.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch
from torch.nn import functional

from lora_utils import UserError
from lora_utils.system.device import GIB

CONTEXT_GIB = 0.35  # CUDA itself, cuBLAS and cuDNN with the kernels that they load
WORKSPACE_GIB = 0.1
FP32_SLOWDOWN = 3.0  # of convolutions, against the rates here, which are half precision's: a T4 does 5 TFLOPS
STREAMED_SHARE = 0.81  # of the data sheet's bandwidth that is reached
MEASURED_SECONDS = 0.2  # for each rate


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
        _card("v100", 15.77, (7, 0), 112, 900),
        _card("p100", 15.9, (6, 0), 18.7, 732),
        _card("rtx3060", 11.76, (8, 6), 51, 360),
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


def card_here(dtype: torch.dtype) -> Card:
    """The GPU here, or the CPU: what is free, and rates from a second of measuring in this precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = _rates(device, dtype)
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        # Nothing is launched on a CPU: the operators' own time is all there is.
        return Card("cpu", memory.total / GIB, memory.available / GIB, None, *rates, 0.0, is_measured=True)

    free, total = torch.cuda.mem_get_info()
    usable = (free + torch.cuda.memory_reserved()) / GIB - WORKSPACE_GIB  # the context is there already
    properties = torch.cuda.get_device_properties(0)
    capability = properties.major, properties.minor
    return Card(properties.name, total / GIB, usable, capability, *rates, is_measured=True)


def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float, float]:
    """GEMM, convolution, attention in TFLOPS; bandwidth such that a copy reaches ``STREAMED_SHARE`` of it."""
    side = (
        4096 if device.type == "cuda" else 512
    )  # large enough to fill the device, small enough for a second
    width = side // 16
    tokens = side // 2
    heads = max(1, side // 256)
    with torch.no_grad():
        square = torch.randn(side, side, device=device).to(dtype)
        picture = torch.randn(1, width, 64, 64, device=device).to(dtype)
        kernel = torch.randn(width, width, 3, 3, device=device).to(dtype)
        query = torch.randn(1, heads, tokens, 64, device=device).to(dtype)
        gemm = _seconds(lambda: square @ square, device)
        conv = _seconds(lambda: functional.conv2d(picture, kernel, padding=1), device)
        attention = _seconds(lambda: functional.scaled_dot_product_attention(query, query, query), device)
        copy = _seconds(lambda: square.clone(), device)

    copied = 2 * square.numel() * square.element_size()  # read and written
    return (
        2 * side**3 / gemm / 1e12,
        2 * width * width * 9 * 64 * 64 / conv / 1e12,
        4 * heads * tokens * tokens * 64 / attention / 1e12,
        copied / copy / 1e9 / STREAMED_SHARE,
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, from as many as fit into a fifth of a second."""
    run()  # the first one chooses and loads kernels
    runs = 0
    started = _now(device)
    elapsed = 0.0
    while elapsed < MEASURED_SECONDS:
        # Several before the clock is read: reading waits for the device, and the queue would run dry.
        for _ in range(8 if device.type == "cuda" else 1):
            run()
            runs += 1
        elapsed = _now(device) - started
    return elapsed / runs


def _now(device: torch.device) -> float:
    """Seconds, when all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
