"""How fast the device here multiplies, convolves, attends and copies: a second of measuring."""

import time
from collections.abc import Callable

import torch
from torch.nn import functional

MEASURED_SECONDS = 0.2  # for each rate


def measure_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float, float]:
    """GEMM, convolution, attention in TFLOPS; bytes that a copy reads and writes, in GB/s."""
    # On a card each takes an H100 a tenth of a millisecond or more, a launch's time many times over, and what
    # is copied is too large for its cache; a CPU is busy with less.
    is_card = device.type == "cuda"
    side, width, tokens = (4096, 640, 2048) if is_card else (512, 32, 256)
    images, heads, copied_mib = (4, 64, 256) if is_card else (1, 2, 1)
    _warm_up(device, dtype)
    with torch.no_grad():
        square = torch.randn(side, side, device=device).to(dtype)
        picture = torch.randn(images, width, 64, 64, device=device).to(dtype)
        kernel = torch.randn(width, width, 3, 3, device=device).to(dtype)
        query = torch.randn(1, heads, tokens, 64, device=device).to(dtype)
        memory = torch.zeros(copied_mib << 20, dtype=torch.uint8, device=device)
        gemm = _seconds(lambda: square @ square, device)
        conv = _seconds(lambda: functional.conv2d(picture, kernel, padding=1), device)
        attention = _seconds(lambda: functional.scaled_dot_product_attention(query, query, query), device)
        copy = _seconds(lambda: memory.clone(), device)

    return (
        2 * side**3 / gemm / 1e12,
        2 * images * width * width * 9 * 64 * 64 / conv / 1e12,
        4 * heads * tokens * tokens * 64 / attention / 1e12,
        2 * memory.nbytes / copy / 1e9,  # read and written
    )


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Let libraries take their memory now: autograd's thread makes handles too, and kernels load late."""
    x = torch.randn(1, 64, 8, 8, device=device).to(dtype).requires_grad_()
    weight = torch.randn(64, 64, 3, 3, device=device).to(dtype).requires_grad_()
    tokens = functional.conv2d(x, weight, padding=1).flatten(2).transpose(1, 2)[None]
    mixed = functional.scaled_dot_product_attention(tokens, tokens, tokens)
    functional.linear(mixed, weight[:, :, 0, 0]).sum().backward()


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
