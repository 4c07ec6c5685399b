"""Whether the cache stays fast and small as it grows:
``python -m benchmarks cache_scale [--counts 1000 100000]``.

Caches of SDXL-sized records (fp16 moments 8x128x128, prompt_embeds 77x2048, pooled 1280) whose tensors are
zeros in sparse files, with true hashes: a fresh process opens each, and reads random batches with every check
that a read has; medians of five such processes. Reading a hole costs no disk access, so what is measured is
our own work, not the disk.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.record import ROOT, save
from lora_utils.precompute.cache import Cache, record_key
from lora_utils.precompute.examples import Entry, read_index, write_index
from lora_utils.precompute.packs import Layout, encode_header

IMAGE = {"moments": torch.zeros(8, 128, 128, dtype=torch.float16), "time_ids": torch.zeros(6)}
TEXT = {
    "prompt_embeds": torch.zeros(77, 2048, dtype=torch.float16),
    "pooled_prompt_embeds": torch.zeros(1280, dtype=torch.float16),
}
BATCH, BATCHES, ROUNDS = 4, 100, 5
ROWS_PER_PACK = 1000


def main() -> None:
    """Build, measure in fresh processes, print, plot and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument(
        "--measure", type=Path, help="used by the program itself: open this cache and read from it"
    )
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    rows = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as name:
            build(Path(name), count)
            command = [sys.executable, "-m", "benchmarks", "cache_scale", "--measure", name]
            runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(ROUNDS)]
            rows.append({"examples": count} | {name: median(run[name] for run in runs) for name in runs[0]})
            print(rows[-1])
    save("cache_scale", {"rows": rows})
    plot(rows)


def build(folder: Path, count: int) -> None:
    """A cache of ``count`` examples, and its index."""
    entries = []
    for number in range(count):
        keys = (record_key(image=number),), (record_key(text=number),)
        caption = f"photo number {number} of a street on a rainy night, with three cars and a traffic light"
        entries.append(Entry(f"pictures/{number:06d}.jpg", (caption,), *keys, (1024, 1024), 1, False))
    for kind, record, keys in (
        ("images", IMAGE, [entry.image_keys[0] for entry in entries]),
        ("texts", TEXT, [entry.text_keys[0] for entry in entries]),
    ):
        for number, start in enumerate(range(0, count, ROWS_PER_PACK)):
            name = f"{kind}-{number + 1:06d}-{number:08x}.safetensors"
            write_sparse(folder / name, Layout.of(record), keys[start : start + ROWS_PER_PACK])
    write_index(folder, entries)


def write_sparse(path: Path, layout: Layout, keys: list[str]) -> None:
    """A pack of zeros that takes no space. As in packs.digest: the data first, then layout and key."""
    zeros = hashlib.sha256(bytes(layout.row_bytes))
    with path.open("wb") as file:
        file.write(encode_header(layout, len(keys), {}))
        file.write(b"".join(bytes.fromhex(key) for key in keys))
        for key in keys:
            hasher = zeros.copy()
            hasher.update(repr(layout.tensors).encode() + bytes.fromhex(key))
            file.write(hasher.digest())
        file.truncate(file.tell() + len(keys) * layout.row_bytes)


def measure(folder: Path) -> dict[str, float]:
    """Open the cache and its index, then read random batches."""
    started = time.perf_counter()
    cache, index = Cache(folder), read_index(folder)
    shapes = {entry.size for entry in index}  # what training looks at before its first step
    opened = time.perf_counter() - started
    rss_mib = peak_rss_mib()
    assert len(shapes) == 1
    chosen = np.random.default_rng(0).integers(len(index), size=(BATCHES, BATCH))
    started = time.perf_counter()
    for batch in chosen:
        for number in batch:
            entry = index[number]
            cache.read(entry.image_keys[0])
            cache.read(entry.text_keys[0])
    spent = time.perf_counter() - started
    return {
        "open_seconds": round(opened, 3),
        "peak_rss_mib_after_open": round(rss_mib),
        "examples_per_second": round(chosen.size / spent, 1),
        "ms_per_example": round(1000 * spent / chosen.size, 3),
    }


def peak_rss_mib() -> float:
    """Most memory since this program began; getrusage would count what the parent process had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def plot(rows: list[dict[str, float]]) -> None:
    """Cost per example against the size of the cache."""
    import matplotlib.pyplot as plt  # here, because the measuring process shall not carry it

    figure, axis = plt.subplots(figsize=(6, 3))
    axis.plot([row["examples"] for row in rows], [row["ms_per_example"] for row in rows], "o-")
    axis.set(
        xscale="log",
        xlabel="examples in the cache",
        ylabel="ms to read one, checked",
        ylim=(0, 1.3 * max(row["ms_per_example"] for row in rows)),
    )
    figure.tight_layout()
    figure.savefig(ROOT / "benchmarks" / "results" / "cache_scale.png", dpi=120)
