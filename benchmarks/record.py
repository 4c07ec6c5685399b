"""Keeps a benchmark's figures with the machine, the date and the commit that they belong to."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from lora_utils.system.files import write_atomically
from lora_utils.system.versions import versions

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"


def save(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and keep them as benchmarks/results/<name>.json."""
    print(write(name, figures, gpu_facts()).read_text(), end="")


def write(
    name: str,
    figures: dict[str, Any],
    gpu: dict[str, Any] | None,
    commit_id: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Keep the figures as <name>.json, over those that were there.

    Args:
        name: The program's, as a rule.
        figures: What json can hold.
        gpu: From ``gpu_facts``, where a GPU is part of the figures.
        commit_id: For a copy of the code that is not git's, and so cannot tell.
        folder: benchmarks/results, when not given.

    Returns:
        The file.
    """
    memory_gib = psutil.virtual_memory().total / 2**30
    content: dict[str, Any] = {
        "figures": figures,
        "machine": f"{_cpu()}, {psutil.cpu_count()} cores, {memory_gib:.0f} GiB RAM",
    }
    if gpu:
        content["gpu"] = gpu
    content |= {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_id or commit(),
        "versions": versions(),
    }

    path = (folder or FOLDER) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def read(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """What was written under this name, if anything was."""
    path = (folder or FOLDER) / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def commit() -> str:
    """Short hash of this copy of the code; empty where it is not git's, or git is not installed."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def gpu_facts() -> dict[str, Any] | None:
    """Name, compute capability, memory, driver and CUDA of the first GPU; None where there is none."""
    import torch  # here: it takes seconds, and not every program that keeps figures needs it

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "total_gib": round(properties.total_memory / 2**30, 2),
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    # torch knows CUDA's version, but not the driver's.
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return None
    return lines[0] if lines else None


def _cpu() -> str:
    # platform.processor() is empty or "x86_64" on Linux, where the kernel knows the model's name.
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()
