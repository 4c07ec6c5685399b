"""Kernels that the step does not use yet: products in 8 bits, and what others have written for Turing.

A library that is not there is told so; one that fails ends its part alone.
"""

import importlib
from typing import Any

import torch

from benchmarks.gpu.bench import ATTENTIONS, GEMMS, HEAD, Bench

NOT_INSTALLED = "not installed"
LEAST = 8  # of any side: cuBLAS multiplies 8-bit numbers in eights


def int8_products(bench: Bench) -> dict[str, float]:
    """TOPS of ``torch._int_mm`` at SDXL's shapes; with rows: each row of the input scaled and rounded before.

    The second is what a W8A8 layer would have to do, forward, against ``gemm``.
    """
    rates = {}
    for shape in GEMMS:
        rows, inputs, outputs = (max(LEAST, side // bench.share) for side in shape)
        rows = max(rows, 32)  # cuBLAS refuses 16 and fewer
        left = bench.draw(rows, inputs)
        codes = left.to(torch.int8)
        weight = bench.draw(outputs, inputs).to(torch.int8)
        weight_scale = torch.rand(outputs, device=bench.device, dtype=bench.dtype)

        def whole(left: Any = left, weight: Any = weight, weight_scale: Any = weight_scale) -> Any:
            scale = left.abs().amax(dim=1, keepdim=True) / 127
            rounded = (left / scale).round_().to(torch.int8)
            return torch._int_mm(rounded, weight.t()) * scale * weight_scale

        name = "x".join(map(str, shape))
        work = 2e-12 * rows * inputs * outputs
        alone = bench.seconds(lambda codes=codes, weight=weight: torch._int_mm(codes, weight.t()))
        rates[name] = work / alone
        rates[f"{name}, with rows"] = work / bench.seconds(whole)
    return rates


def turing_attention(bench: Bench) -> dict[str, float] | str:
    """TFLOPS of flash-attention-turing's kernels (B, tokens, heads, width), counted as ``attention`` is."""
    library = _library("flash_attn_turing")
    if library is None:
        return NOT_INSTALLED
    rates = {}
    for heads, queries, keys in ATTENTIONS:
        q, k, v = (bench.draw(1, tokens // bench.share, heads, HEAD) for tokens in (queries, keys, keys))
        tflop = 4e-12 * heads * HEAD * q.shape[1] * k.shape[1]
        out, logsumexp = library.fwd(q, k, v, False)
        grad = torch.randn_like(out)
        name = f"{heads}x{queries}x{keys}"
        forward = bench.seconds(lambda q=q, k=k, v=v: library.fwd(q, k, v, False))
        rates[f"{name} forward"] = tflop / forward
        given = (q, k, v, out, logsumexp, grad, False)
        rates[f"{name} backward"] = 2.5 * tflop / bench.seconds(lambda given=given: library.bwd(*given))
    return rates


def comfy_products(bench: Bench) -> dict[str, float] | str:
    """TOPS of comfy-kitchen's 8-bit linear at SDXL's shapes, with all that it does to the input."""
    library = _library("comfy_kitchen")
    if library is None:
        return NOT_INSTALLED
    rates = {}
    for shape in GEMMS:
        rows, inputs, outputs = (max(32, side // bench.share) for side in shape)
        x = bench.draw(rows, inputs)
        codes, scale = library.quantize_int8_tensorwise(bench.draw(outputs, inputs))
        seconds = bench.seconds(
            lambda x=x, codes=codes, scale=scale: library.int8_linear(x, codes, scale, out_dtype=bench.dtype)
        )
        rates["x".join(map(str, shape))] = 2e-12 * rows * inputs * outputs / seconds
    return rates


def _library(name: str) -> Any:
    """The module; None where it is not installed or not for this machine."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None
