"""What a card does in a second, kernel by kernel: what the step uses beside what it could use."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report.tables import Results, table

WITH_ROWS = ", with rows"
DIRECTIONS = ("forward", "backward")


def on_rates(results: Results) -> Iterator[str]:
    """A chapter for each card whose rates were measured, all of them or some."""
    for name in results.gpus("micro_"):
        rates = results.figures(name)["records"].get("micro", {})
        yield f"## Rates of {results.told(name)}"
        yield (
            "Products of rows, inputs and outputs, and attention of heads, queries and keys, as SDXL"
            "\nhas them. With 8 bits and scaling, rows of the input are scaled and rounded before."
        )
        yield table(_products(rates))
        yield table(_attention(rates))
        yield table(_others(rates))


def _products(rates: dict[str, Any]) -> Iterator[dict[str, Any]]:
    eight_bits = rates.get("int8_gemm", {})
    comfy = rates.get("comfy_kitchen", {})
    for shape, tflops in rates.get("gemm", {}).items():
        row = {"product": shape, "fp16, TFLOPS": tflops}
        if eight_bits:
            row["8 bits, TOPS"] = eight_bits.get(shape)
            row["8 bits and scaling"] = eight_bits.get(shape + WITH_ROWS)
        if isinstance(comfy, dict) and comfy:
            row["comfy-kitchen"] = comfy.get(shape)
        yield row


def _attention(rates: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each shape."""
    columns = {"": rates.get("attention", {}), "flash-attention-turing ": rates.get("flash_attn_turing", {})}
    shapes = dict.fromkeys(name.split(" ")[0] for name in columns[""])
    for shape in shapes:
        row: dict[str, Any] = {"attention": shape}
        for label, figures in columns.items():
            if isinstance(figures, dict) and figures:
                row |= {f"{label}{way}, TFLOPS": figures.get(f"{shape} {way}") for way in DIRECTIONS}
        yield row


def _others(rates: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, tflops in rates.get("conv", {}).items():
        yield {"kernel": f"convolution {name.replace('@', ' channels at ')}", "rate": f"{tflops:.3g} TFLOPS"}
    unpacking = {f"unpacking {bits}": gbs for bits, gbs in rates.get("unpack", {}).items()}
    for name, gbs in {**rates.get("stream", {}), **unpacking}.items():
        yield {"kernel": name, "rate": "no kernel" if gbs is None else f"{gbs:,.0f} GB/s"}
    if "launch_us" in rates:
        yield {"kernel": "from launch to launch", "rate": f"{rates['launch_us']:.3g} µs"}
    for name, message in rates.get("failures", {}).items():
        yield {"kernel": name, "rate": message}
