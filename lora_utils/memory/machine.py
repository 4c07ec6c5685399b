"""The check before anything is downloaded: data, base, disk, memory, versions, card, precision."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from huggingface_hub import try_to_load_from_cache
from packaging.version import Version

from lora_utils.config.schema import CheckpointConfig, ModelConfig, PathsConfig
from lora_utils.model.examination import locate
from lora_utils.system.files import nearest_existing
from lora_utils.system.locations import why_unwritable
from lora_utils.system.units import GIB
from lora_utils.system.versions import versions

PEFT_NEEDS_TORCHAO = Version("0.16")


def describe(model: ModelConfig, paths: PathsConfig, data: str) -> str:
    """All lines of ``description``."""
    return "\n".join(description(model, paths, data))


def description(model: ModelConfig, paths: PathsConfig, data: str) -> Iterator[str]:
    """Data, base, disk, memory, versions, card and precision, line by line. Downloads nothing.

    Args:
        model: The base model, and the precision that is wanted.
        paths: Where results go, and where models are kept.
        data: What is known of the examples, from ``data.dataset.describe_data``.

    Raises:
        MachineError: The precision cannot be had here.
    """
    yield f"data        {data}"
    yield f"base        {model.pretrained_model_name_or_path}: {_where(model, paths.cache_dir)}"
    yield f"disk        {free_disk_gib(paths.run_folder):.1f} GiB free for {paths.run_folder}"
    ram = psutil.virtual_memory()
    yield f"RAM         {ram.available / GIB:.1f} of {ram.total / GIB:.1f} GiB free, {os.cpu_count()} cores"
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    yield f"versions    {installed}"
    for problem in problems():
        yield f"attention   {problem}"

    # Last, as this loads torch: what is above stands on the screen meanwhile.
    from lora_utils.system.device import choose_precision, compute_capability

    yield f"card        {_card()}"
    precision = choose_precision(model.mixed_precision, compute_capability())
    yield f"precision   {precision.name}: {precision.reason}"


def unwritable(paths: PathsConfig, checkpoint: CheckpointConfig) -> list[str]:
    """The folders of a run into which nothing could be written, each with what is in the way."""
    folders = {
        "output_dir": paths.run_folder,
        "precompute_dir": paths.precompute_dir,
        "infer_path": paths.infer_path,
        "mirror_dir": checkpoint.mirror_dir,
    }
    return unwritable_among(folders)


def unwritable_among(folders: Mapping[str, Path | None]) -> list[str]:
    """The same of some folders, by the settings that name them."""
    problems = []
    for setting, folder in folders.items():
        problem = folder and why_unwritable(folder)
        if problem:
            problems.append(f"{setting} {folder} cannot be written: {problem}; set it to another folder")
    return problems


def problems() -> list[str]:
    """What on this machine is known to break a run, each with its cure."""
    problems = []
    torchao = versions(["torchao"])["torchao"]
    # Colab brings an old one along, which peft looks at as soon as it is installed.
    if torchao != "not installed" and Version(torchao) < PEFT_NEEDS_TORCHAO:
        problems.append(f"torchao {torchao} makes every LoRA fail in peft: pip uninstall -y torchao")
    return problems


def free_disk_gib(folder: Path) -> float:
    """Space left where a folder is, or would be."""
    return shutil.disk_usage(nearest_existing(folder)).free / GIB


def _card() -> str:
    import torch

    if not torch.cuda.is_available():
        apple = ": Apple's GPU (mps) is not used, as none of this was tried on one"
        return "none; computing on the CPU" + (apple if torch.backends.mps.is_available() else "")
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / GIB:.1f} GiB, sm_{card.major}{card.minor}"


def _where(model: ModelConfig, cache_dir: Path | None) -> str:
    """Whether the base model is on this machine; its index alone is looked for, which every pipeline has."""
    name = model.base
    if locate(name):
        return "a folder here"
    index = try_to_load_from_cache(name, "model_index.json", cache_dir=cache_dir, revision=model.revision)
    if isinstance(index, str):  # else None, or a mark that the file is known to be absent
        return "already downloaded"
    return "on the Hub, to be downloaded when it is needed"
