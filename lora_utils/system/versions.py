"""Versions of the packages that a result depends on, without importing them."""

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
    numbers = {"python": platform.python_version(), "lora_utils": __version__}
    for package in packages:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = "not installed"
    return numbers
