"""What a run is called when nobody names it: after its data and its preset."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_utils.config.section import expanded

NAMELESS = "lora"
LONGEST = 60
"""Characters of each half: a name has to fit beside others on a line, and into a file system."""


def default_run_name(leaves: Mapping[str, Any], file: Path | None) -> str:
    """``<data>-<preset>``, of characters that every file system takes.

    Args:
        leaves: The settings as they were named, before they are checked.
        file: The preset or config file that they come from.
    """
    sources = leaves.get("train_data_dir")
    first = next(iter(sources), None) if isinstance(sources, list | tuple) else sources
    # A Python file reads the folder: what it reads says more than what reads it.
    data = _last_part(first) or _last_part(leaves.get("dataset_name"))
    preset = _plain(file.stem) if file else ""
    return f"{data}-{preset or NAMELESS}" if data else preset or NAMELESS


def plain_name(name: str) -> str:
    """The name, where it can be a folder's on every system.

    Raises:
        ValueError: It cannot.
    """
    # Not pydantic's pattern: its letters are others than Python's, which made the name.
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError("should be letters, digits, _, - and dots, and begin with none of the last two")
    return name


def _last_part(source: object) -> str:
    """The name of a folder, of a file without its ending, or of a dataset on the Hub."""
    text = str(source or "").strip()
    if not text:
        return ""
    # What cannot be expanded is refused a moment later, by its setting.
    with contextlib.suppress(ValueError):
        text = expanded(text)
    path = Path(text)
    # "." and "pictures/.." have no name of their own.
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return _plain(Path(name).stem if path.is_file() or name.endswith(".py") else name)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._-")[:LONGEST]
