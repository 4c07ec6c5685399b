"""The rates that decide an SDXL step: products, convolutions, attention, unpacking, launches. A minute or so.

Sizes are SDXL's own at 1024x1024, fp16. A prediction of whole steps follows from them by the forecast's
roofline.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.cases import Case
from benchmarks.gpu.device import Settings, facts, synchronise
from benchmarks.gpu.forecasts import count
from lora_utils.memory.cards import STREAMED_SHARE, T4, Card
from lora_utils.model import lean_ops

GEMMS = [
    (1024, 1280, 1280),
    (1024, 1280, 10240),
    (4096, 640, 640),
    (4096, 640, 5120),
    (1024, 1280, 32),
    (4096,) * 3,
]
STEP_GEMMS = 4  # the first ones are what an SDXL step consists of
CONVOLUTIONS = [(320, 128), (640, 64), (1280, 32)]  # channels, side
ATTENTIONS = [(10, 4096, 4096), (20, 1024, 1024), (10, 4096, 77), (20, 1024, 77)]  # heads, queries, keys
HEAD = 64
PREDICTED = (Case("ours"), Case("ours, all recomputed", plan="full"), Case("example script", "script"))


def micro(settings: Settings) -> dict[str, Any]:
    """All rates, and what they predict."""
    bench = _Bench(settings)
    figures: dict[str, Any] = {"launch_us": bench.launch_us()}
    for name, measure in (
        ("gemm", bench.gemms),
        ("conv", bench.convolutions),
        ("attention", bench.attentions),
        ("stream", bench.streams),
        ("unpack", bench.unpacking),
        ("sustained", bench.sustained),
    ):
        figures[name] = measure()
    figures["predicted_step_seconds"] = bench.predict(figures)
    for name, figure in figures.items():
        rows = figure.items() if isinstance(figure, dict) else [("", figure)]
        for key, value in rows:
            print(f"{name} {key}: {'not measured' if value is None else f'{value:.3g}'}", flush=True)
    return figures


class _Bench:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.device
        self.share = 16 if settings.rehearse else 1
        self.dtype = torch.float16

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run: the median of five groups, a third of a second in all, by events on a GPU."""
        run()  # the first one chooses and loads kernels
        once = self._group(run, 1)
        runs = max(1, min(1000, int((0.001 if self.settings.rehearse else 0.06) / once)))
        return statistics.median(self._group(run, runs) / runs for _ in range(5))

    def _group(self, run: Callable[[], object], runs: int) -> float:
        synchronise(self.settings)
        if self.device.type == "cpu":
            started = time.perf_counter()
            for _ in range(runs):
                run()
            return time.perf_counter() - started
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(runs):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def launch_us(self) -> float:
        """From one tiny kernel to the next."""
        number = self.draw(1)
        with torch.no_grad():
            return 1e6 * self.seconds(lambda: [number.add_(1) for _ in range(100)]) / 100

    def gemms(self) -> dict[str, float]:
        """TFLOPS, rows x inputs x outputs."""
        rates = {}
        for shape in GEMMS:
            rows, inputs, outputs = (max(1, side // self.share) for side in shape)
            left = self.draw(rows, inputs)
            right = self.draw(outputs, inputs)
            seconds = self.seconds(lambda left=left, right=right: functional.linear(left, right))
            rates["x".join(map(str, shape))] = 2e-12 * rows * inputs * outputs / seconds
        return rates

    def convolutions(self) -> dict[str, float]:
        """TFLOPS of 3x3 kernels, forward and the gradient of the input, in both layouts."""
        rates = {}
        rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])
        for channels, side in CONVOLUTIONS:
            width = channels // self.share
            size = side // self.share
            for layout in (torch.contiguous_format, torch.channels_last):
                x = self.draw(1, width, size, size).to(memory_format=layout)
                kernel = self.draw(width, width, 3, 3).to(memory_format=layout)
                runs = {
                    "forward": lambda x=x, kernel=kernel: functional.conv2d(x, kernel, padding=1),
                    "backward": lambda x=x, kernel=kernel: torch.ops.aten.convolution_backward(
                        x, x, kernel, None, *rest
                    ),
                }
                name = "NHWC" if layout is torch.channels_last else "NCHW"
                for direction, run in runs.items():
                    tflop = 2e-12 * width * width * 9 * size * size
                    rates[f"{channels}@{side} {name} {direction}"] = tflop / self.seconds(run)
        return rates

    def attentions(self) -> dict[str, float]:
        """TFLOPS of the memory-efficient kernel; its backward pass is counted as 2.5 times the forward."""
        rates = {}
        backend = SDPBackend.MATH if self.device.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION
        for heads, queries, keys in ATTENTIONS:
            shapes = [(1, heads, tokens // self.share, HEAD) for tokens in (queries, keys, keys)]
            q, k, v = (self.draw(*shape).requires_grad_() for shape in shapes)
            tflop = 4e-12 * heads * HEAD * shapes[0][2] * shapes[1][2]
            with sdpa_kernel(backend):
                run = partial(functional.scaled_dot_product_attention, q, k, v)
                out = run()
                back = partial(torch.autograd.grad, out, (q, k, v), torch.randn_like(out), retain_graph=True)
                forward = self.seconds(run)
                backward = self.seconds(back)
            rates[f"{heads}x{queries}x{keys} forward"] = tflop / forward
            rates[f"{heads}x{queries}x{keys} backward"] = 2.5 * tflop / backward
        return rates

    def streams(self) -> dict[str, float]:
        """GB/s, bytes of input and output once each."""
        big = self.draw(2**27 // self.share**2)
        picture = self.draw(1, 320, 128 // self.share, 128)
        tokens = self.draw(4096 // self.share, 5120)
        norm = torch.nn.GroupNorm(32, 320).to(self.device, self.dtype)
        with torch.no_grad():
            rows = {
                "copy": (2 * big.nbytes, lambda: big.clone()),
                "geglu": (1.5 * tokens.nbytes, lambda: lean_ops.geglu(tokens)),
                "layer norm": (2 * tokens.nbytes, lambda: functional.layer_norm(tokens, (5120,))),
                "group norm, silu": (2 * picture.nbytes, lambda: lean_ops.group_norm_silu(picture, norm)),
                "add": (3 * tokens.nbytes, lambda: tokens + tokens),
            }
            return {name: 1e-9 * size / self.seconds(run) for name, (size, run) in rows.items()}

    def unpacking(self) -> dict[str, float | None]:
        """GB/s of fp16 weights that come out of 8 and 4 bits; None where bitsandbytes cannot."""
        weight = self.draw(10240 // self.share, 1280)
        codes = weight.to(torch.int8)
        scale = torch.rand(len(weight), 1, device=self.device)
        rates: dict[str, float | None] = {
            "int8": 1e-9
            * weight.nbytes
            / self.seconds(lambda: torch.mul(codes, scale, out=torch.empty_like(weight)))
        }
        try:
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        except (ImportError, AttributeError, OSError, RuntimeError):  # no package, library, kernel
            return rates | {"nf4": None}
        return rates | {"nf4": 1e-9 * weight.nbytes / self.seconds(lambda: dequantize_4bit(packed, state))}

    def sustained(self) -> dict[str, float]:
        """TFLOPS of a large product in the first and in the last of eight seconds: heat slows some cards."""
        side = 4096 // self.share
        duration = 0.02 if self.settings.rehearse else 8.0
        square = self.draw(side, side)
        rates = []
        started = time.monotonic()
        while time.monotonic() - started < duration or not rates:
            rates.append(2e-12 * side**3 * 10 / self._group(lambda: square @ square, 10))
        tenth = max(1, len(rates) // 8)
        return {"first": statistics.mean(rates[:tenth]), "last": statistics.mean(rates[-tenth:])}

    def predict(self, figures: dict[str, Any]) -> dict[str, float]:
        """Seconds of a step: each kind of work at the rate that its own sizes reached."""
        gemm = statistics.harmonic_mean(list(figures["gemm"].values())[:STEP_GEMMS])
        conv = statistics.harmonic_mean([rate for name, rate in figures["conv"].items() if "NCHW" in name])
        attention = statistics.harmonic_mean(list(figures["attention"].values())[:4])
        stream = statistics.harmonic_mean(
            [rate for name, rate in figures["stream"].items() if name != "copy"]
        )
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
            case.name: count(case, T4.usable_gib)
            for case in PREDICTED[: 1 if self.settings.rehearse else None]
        }
        return {name: counted.seconds(card) for name, counted in steps.items() if counted}
