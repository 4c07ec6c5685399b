"""system.versions: carried out of runlog."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from lora_utils import __version__

PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "pydantic",
    "numpy", "pillow", "ipywidgets", "papermill",
)  # fmt: skip


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python, this package and the given ones; a package that is absent says so."""
    found = {"python": platform.python_version(), "lora_utils": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
