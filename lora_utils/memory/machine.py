"""The check before anything is downloaded: card, precision, memory, disk, data, versions."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from packaging.version import Version

from lora_utils import UserError
from lora_utils.cards import half_precision
from lora_utils.dataset import find_examples
from lora_utils.memory import DTYPES, GIB
from lora_utils.runlog import versions
from lora_utils.schema import RunConfig


@dataclass(frozen=True)
class Precision:
    """How the U-Net computes, and why."""

    name: str
    """fp32, fp16 or bf16."""
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


class MachineError(UserError):
    """The machine cannot do what the settings ask for."""


def choose_preset(wanted: str) -> str:
    """The preset that auto stands for: LORA_PRESET where that is set, t4 on a GPU, else tiny.

    Raises:
        MachineError: On Colab without a GPU, where tiny is most likely not what was meant.
    """
    if wanted != "auto":
        return wanted
    if chosen := os.environ.get("LORA_PRESET"):
        return chosen
    if torch.cuda.is_available():
        return "t4"
    if any(name.startswith("COLAB_") for name in os.environ):
        raise MachineError(
            "this Colab runtime has no GPU: choose Runtime > Change runtime type > T4 GPU, then run all cells "
            'again; preset = "tiny" tries everything on the CPU with a toy model'
        )
    return "tiny"


def choose_precision(wanted: str) -> Precision:
    """The precision for this machine.

    Args:
        wanted: The setting mixed_precision. auto follows ``accelerate launch --mixed_precision`` where that was given,
            else the card.

    Raises:
        MachineError: fp16 without a GPU.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted == "fp16" and not torch.cuda.is_available():
        raise MachineError("mixed_precision=fp16 needs a CUDA GPU, and there is none; set it to auto or fp32")
    if wanted != "auto":
        return Precision(wanted, "mixed_precision says so")
    if not torch.cuda.is_available():
        return Precision("fp32", "there is no GPU")
    if launched in DTYPES:
        return Precision(launched, "accelerate launch says so")
    major, minor = torch.cuda.get_device_capability()
    name = half_precision((major, minor))
    return Precision(name, f"sm_{major}{minor} has {'' if name == 'bf16' else 'no '}bf16 arithmetic")


def describe(config: RunConfig) -> str:
    """Card, precision, memory, disk, data and versions, as text. Downloads nothing."""
    precision, ram = choose_precision(config.model.mixed_precision), psutil.virtual_memory()
    lines = [
        f"card        {_card()}",
        f"precision   {precision.name}: {precision.reason}",
        f"RAM         {ram.available / GIB:.1f} of {ram.total / GIB:.1f} GiB free, {os.cpu_count()} cores",
        f"disk        {free_disk_gib(config.paths.output_dir):.1f} GiB free for {config.paths.output_dir}",
        f"base        {config.model.pretrained_model_name_or_path}: {_where(config)}",
        f"data        {_data(config)}",
        *(f"attention   {problem}" for problem in problems()),
        "versions    " + ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    return "\n".join(lines)


def count_examples(config: RunConfig) -> int | None:
    """How many captioned images the folders hold; None where that takes more than a look."""
    return len(find_examples(config.data).examples) if config.data.train_data_dir else None


def problems() -> list[str]:
    """What on this machine is known to break a run, each with its cure."""
    found = []
    torchao = versions(["torchao"])["torchao"]
    if torchao != "not installed" and Version(torchao) < Version("0.16"):
        found.append(f"torchao {torchao} makes every LoRA fail in peft: pip uninstall -y torchao")
    return found


def _card() -> str:
    if not torch.cuda.is_available():
        return "none; computing on the CPU"
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / GIB:.1f} GiB, sm_{card.major}{card.minor}"


def free_disk_gib(folder: Path) -> float:
    """Space left where a folder is, or would be."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(existing).free / GIB


def _where(config: RunConfig) -> str:
    name = config.model.pretrained_model_name_or_path
    if Path(name).is_dir():
        return "a folder here"
    cached = try_to_load_from_cache(
        name, "model_index.json", cache_dir=config.paths.cache_dir, revision=config.model.revision
    )
    return "already downloaded" if isinstance(cached, str) else "on the Hub, to be downloaded when it is needed"


def _data(config: RunConfig) -> str:
    if config.data.dataset_name and not config.data.train_data_dir:
        return f"{config.data.dataset_name}; check --data loads it and looks into it"
    if config.data.train_data_dir is None:
        return "neither train_data_dir nor dataset_name is set"
    found = find_examples(config.data)
    refused = sum(finding.kind == "refused" for finding in found.findings)
    return f"{len(found.examples)} captioned images, {refused} refused; check --data looks into them; {found.rule}"
