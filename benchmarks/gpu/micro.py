"""The rates that decide an SDXL step: products, convolutions, attention, unpacking, launches. A minute or so.

Sizes are SDXL's own at 1024x1024, fp16. A prediction of whole steps follows from them by the forecast's
roofline; it comes last, so that nothing that was measured waits for it.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import kernels
from benchmarks.gpu.bench import ATTENTIONS, CONVOLUTIONS, GEMMS, HEAD, Bench
from benchmarks.gpu.cases import PREDICTION, Case
from benchmarks.gpu.device import Settings, facts
from benchmarks.gpu.forecasts import count
from lora_utils.memory.cards import STREAMED_SHARE, T4, Card
from lora_utils.model import lean_ops

STEP_GEMMS = 4  # the first ones are what an SDXL step consists of
PREDICTED = (Case("ours"), Case("ours, all recomputed", plan="full"), Case("example script", "script"))


def micro(settings: Settings, part: str, figures: dict[str, Any]) -> dict[str, Any]:
    """One part of ``cases.RATE_SECONDS``; the prediction needs the figures of the others."""
    bench = Bench(settings)
    if part == PREDICTION:
        return {part: predict(bench, figures)}
    return {part: RATES[part](bench)}


def launch_us(bench: Bench) -> float:
    """From one tiny kernel to the next."""
    number = bench.draw(1)
    with torch.no_grad():
        return 1e6 * bench.seconds(lambda: [number.add_(1) for _ in range(100)]) / 100


def gemms(bench: Bench) -> dict[str, float]:
    """TFLOPS, rows x inputs x outputs."""
    rates = {}
    for shape in GEMMS:
        rows, inputs, outputs = (max(1, side // bench.share) for side in shape)
        left = bench.draw(rows, inputs)
        right = bench.draw(outputs, inputs)
        seconds = bench.seconds(lambda left=left, right=right: functional.linear(left, right))
        rates["x".join(map(str, shape))] = 2e-12 * rows * inputs * outputs / seconds
    return rates


def convolutions(bench: Bench) -> dict[str, float]:
    """TFLOPS of 3x3 kernels, forward and the gradient of the input, in both layouts."""
    rates = {}
    rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])
    for channels, side in CONVOLUTIONS:
        width = channels // bench.share
        size = side // bench.share
        for layout in (torch.contiguous_format, torch.channels_last):
            x = bench.draw(1, width, size, size).to(memory_format=layout)
            kernel = bench.draw(width, width, 3, 3).to(memory_format=layout)
            runs = {
                "forward": lambda x=x, kernel=kernel: functional.conv2d(x, kernel, padding=1),
                "backward": lambda x=x, kernel=kernel: torch.ops.aten.convolution_backward(
                    x, x, kernel, None, *rest
                ),
            }
            name = "NHWC" if layout is torch.channels_last else "NCHW"
            for direction, run in runs.items():
                tflop = 2e-12 * width * width * 9 * size * size
                rates[f"{channels}@{side} {name} {direction}"] = tflop / bench.seconds(run)
    return rates


def attentions(bench: Bench) -> dict[str, float]:
    """TFLOPS of the memory-efficient kernel; its backward pass is counted as 2.5 times the forward."""
    rates = {}
    backend = SDPBackend.MATH if bench.device.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION
    for heads, queries, keys in ATTENTIONS:
        shapes = [(1, heads, tokens // bench.share, HEAD) for tokens in (queries, keys, keys)]
        q, k, v = (bench.draw(*shape).requires_grad_() for shape in shapes)
        tflop = 4e-12 * heads * HEAD * shapes[0][2] * shapes[1][2]
        with sdpa_kernel(backend):
            run = partial(functional.scaled_dot_product_attention, q, k, v)
            out = run()
            back = partial(torch.autograd.grad, out, (q, k, v), torch.randn_like(out), retain_graph=True)
            forward = bench.seconds(run)
            backward = bench.seconds(back)
        rates[f"{heads}x{queries}x{keys} forward"] = tflop / forward
        rates[f"{heads}x{queries}x{keys} backward"] = 2.5 * tflop / backward
    return rates


def streams(bench: Bench) -> dict[str, float]:
    """GB/s, bytes of input and output once each."""
    big = bench.draw(2**27 // bench.share**2)
    picture = bench.draw(1, 320, 128 // bench.share, 128)
    tokens = bench.draw(4096 // bench.share, 5120)
    norm = torch.nn.GroupNorm(32, 320).to(bench.device, bench.dtype)
    with torch.no_grad():
        rows = {
            "copy": (2 * big.nbytes, lambda: big.clone()),
            "geglu": (1.5 * tokens.nbytes, lambda: lean_ops.geglu(tokens)),
            "layer norm": (2 * tokens.nbytes, lambda: functional.layer_norm(tokens, (5120,))),
            "group norm, silu": (2 * picture.nbytes, lambda: lean_ops.group_norm_silu(picture, norm)),
            "add": (3 * tokens.nbytes, lambda: tokens + tokens),
        }
        return {name: 1e-9 * size / bench.seconds(run) for name, (size, run) in rows.items()}


def unpacking(bench: Bench) -> dict[str, float | None]:
    """GB/s of fp16 weights that come out of 8 and 4 bits; None where bitsandbytes cannot."""
    weight = bench.draw(10240 // bench.share, 1280)
    codes = weight.to(torch.int8)
    scale = torch.rand(len(weight), 1, device=bench.device)
    rates: dict[str, float | None] = {
        "int8": 1e-9
        * weight.nbytes
        / bench.seconds(lambda: torch.mul(codes, scale, out=torch.empty_like(weight)))
    }
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    except (ImportError, AttributeError, OSError, RuntimeError):  # no package, library, kernel
        return rates | {"nf4": None}
    return rates | {"nf4": 1e-9 * weight.nbytes / bench.seconds(lambda: dequantize_4bit(packed, state))}


def sustained(bench: Bench) -> dict[str, float]:
    """TFLOPS of a large product in the first and in the last of eight seconds: heat slows some cards."""
    side = 4096 // bench.share
    duration = 0.02 if bench.settings.rehearse else 8.0
    square = bench.draw(side, side)
    rates = []
    started = time.monotonic()
    while time.monotonic() - started < duration or not rates:
        rates.append(2e-12 * side**3 * 10 / bench.group(lambda: square @ square, 10))
    tenth = max(1, len(rates) // 8)
    return {"first": statistics.mean(rates[:tenth]), "last": statistics.mean(rates[-tenth:])}


def predict(bench: Bench, figures: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step: each kind of work at the rate that its own sizes reached."""
    gemm = statistics.harmonic_mean(list(figures["gemm"].values())[:STEP_GEMMS])
    conv = statistics.harmonic_mean([rate for name, rate in figures["conv"].items() if "NCHW" in name])
    attention = statistics.harmonic_mean(list(figures["attention"].values())[:4])
    stream = statistics.harmonic_mean([rate for name, rate in figures["stream"].items() if name != "copy"])
    usable = facts()["usable_gib"] or T4.usable_gib
    card = Card(
        "here",
        usable,
        usable,
        None,
        gemm,
        conv,
        attention,
        stream / STREAMED_SHARE,
        figures["launch_us"],
        True,
    )
    steps = {
        case.name: count(case, T4.usable_gib) for case in PREDICTED[: 1 if bench.settings.rehearse else None]
    }
    return {name: counted.seconds(card) for name, counted in steps.items() if counted}


RATES: dict[str, Callable[[Bench], Any]] = {
    "launch_us": launch_us,
    "gemm": gemms,
    "conv": convolutions,
    "attention": attentions,
    "stream": streams,
    "unpack": unpacking,
    "int8_gemm": kernels.int8_products,
    "flash_attn_turing": kernels.turing_attention,
    "comfy_kitchen": kernels.comfy_products,
    "sustained": sustained,
}
