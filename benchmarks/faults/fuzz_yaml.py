"""Whether strange config files are read or refused in one line, quickly and in little memory.

``python -m benchmarks fuzz_yaml [--inputs 100000] [--seed 0]``; CPU, one core. Each must end as a valid
config or as an error of one line, within a second of CPU time; all of them within 200 MB.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from benchmarks import record
from benchmarks.faults.yaml_inputs import CONFIGS, inputs, outcome
from lora_utils.config.loading import load_config

LONGEST_SECONDS = 1.0
"""CPU time that one input may take."""
MOST_GROWTH_MB = 200.0
PEAK_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def main() -> None:
    """Run the campaign, print and keep; exits with 1 when an input came to anything else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    for config in CONFIGS:
        load_config(config)  # what loading imports and caches is no growth
    before_bytes = psutil.Process().memory_info().rss
    started = time.monotonic()
    outcomes, seconds = _load_all(options.seed, options.inputs)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT_BYTES
    figures = {
        "inputs": options.inputs,
        "seed": options.seed,
        "valid": outcomes.pop("valid", 0),
        "refused_in_one_line": outcomes.pop("refused", 0),
        "anything_else": sum(outcomes.values()),
        "median_cpu_ms": round(sorted(seconds)[len(seconds) // 2] * 1000, 2),
        "longest_cpu_seconds": round(max(seconds), 3),
        "memory_growth_mb": round((peak_bytes - before_bytes) / 1e6, 1),
        "seconds": round(time.monotonic() - started),
    }
    record.save("fuzz_yaml", figures)

    too_long = figures["longest_cpu_seconds"] >= LONGEST_SECONDS
    too_large = figures["memory_growth_mb"] >= MOST_GROWTH_MB
    if figures["anything_else"] or too_long or too_large:
        raise SystemExit(f"failed: {dict(outcomes) or 'too long or too much memory'}")


def _load_all(seed: int, count: int) -> tuple[Counter[str], list[float]]:
    outcomes = Counter[str]()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for content in inputs(seed, count):
            started = time.process_time()  # not the clock: other work on the machine is no fault of the input
            try:
                outcomes[outcome(content, Path(folder) / "run.yaml")] += 1
            except Exception as error:  # noqa: BLE001 - any other outcome is what this looks for
                outcomes[type(error).__name__] += 1
                print(f"{type(error).__name__}: {error!s:.300}\n  {content[:300]!r}", file=sys.stderr)
            seconds.append(time.process_time() - started)
    return outcomes, seconds
