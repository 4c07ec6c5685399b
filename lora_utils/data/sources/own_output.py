"""Folders that this program has written: runs, comparisons, caches, mirrors. What lies in them is no data.

They are recognised by what is in them, whichever run's they are: a folder that is not recognisable yet holds
no picture either. Pictures of a comparison that were moved carry their settings (``data.inspection``).
"""

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from lora_utils.data.examples import DataError
from lora_utils.data.formats import SUFFIXES

_SECTIONS = (b"paths", b"data", b"lora", b"train", b"checkpoint", b"compare")
_MAX_CONFIG_BYTES = 100_000
_BESIDE_CONFIG = {"summary.json", "versions.json", "metrics.jsonl", "run.json", "checkpoints", "precomputed"}
_PACK = re.compile(r"(images|texts)-\d{6,}-[0-9a-f]{8}\.safetensors")
_CHECKPOINT = re.compile(r"step-\d{9}")
_PICTURE = re.compile(r"sheet\.png|(baseline|finetuned)_\d+_seed-?\d+\.png")


def describe_output(folder: Path, names: Collection[str]) -> str:
    """What a folder is, where this program has written it; empty for any other.

    Args:
        folder: The folder.
        names: Of all files and folders in it.
    """
    # Other programs keep a config.yaml too, and users copy ours: it takes our sections and a second sign.
    if "config.yaml" in names and _is_our_config(folder / "config.yaml"):
        if not _BESIDE_CONFIG.isdisjoint(names):
            return "folder of a run"
        if any(_PICTURE.fullmatch(name) for name in names):
            return "folder of a comparison"
    # These two hold no pictures; where there are some, a setting has led here what is not alone here.
    if any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names):
        return ""
    if any(_PACK.fullmatch(name) for name in names):
        return "cache of a run"
    if any(_CHECKPOINT.fullmatch(name) for name in names):
        return "checkpoints of a run"
    return ""


def refuse_output(folder: Path, setting: str) -> None:
    """Nothing, where a folder of data is not one that this program has written.

    Args:
        folder: The folder that is to be learned from.
        setting: Where the user has named it.

    Raises:
        DataError: It is one.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):  # whoever looks through the folder says why it cannot be opened
        names = os.listdir(folder)
    output = describe_output(folder, names)
    if output:
        raise DataError(
            f"{folder} is the {output} (written by this program), and what it has drawn is no data; set "
            f"{setting} to the folder of your images, or move them out of this one"
        )


def _is_our_config(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES)
    except OSError:
        return False
    return set(_SECTIONS) <= set(re.findall(rb"^(\w+):", content, re.MULTILINE))
