"""Keeps footprints on disk: counting SDXL takes seconds, and depends on shapes and versions alone."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lora_utils.files import write_atomically
from lora_utils.footprints import Footprint
from lora_utils.runlog import versions

FORMAT = TypeAdapter(Footprint)
PACKAGES = ["torch", "diffusers", "transformers", "peft"]


def remembered(function: Callable[..., Footprint], *args: Any, folder: Path | None = None) -> Footprint:
    """The function's result, from disk where it was counted before with the same versions and code.

    Args:
        function: One of ``footprints`` or ``steps``.
        args: All that decides its result, by their ``repr``.
        folder: Where results are kept; ~/.cache when not given.
    """
    content = repr((function.__name__, args, versions(PACKAGES), _code()))
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    file = (folder or home / "lora_utils") / "forecasts" / f"{name}.json"
    with suppress(OSError, ValidationError):
        return FORMAT.validate_json(file.read_bytes())
    found = function(*args)
    with suppress(OSError):  # a full or read-only disk costs some seconds the next time
        write_atomically(file, FORMAT.dump_json(found))
    return found


def _code() -> str:
    """Hash of the modules that a footprint depends on, so that editing one forgets what it counted."""
    names = ("allocator", "autocast", "footprints", "lean", "lora", "nodes", "operators", "optimizers", "quantisation")
    files = [Path(__file__).with_name(f"{name}.py") for name in (*names, "recompute", "simulation", "steps")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
