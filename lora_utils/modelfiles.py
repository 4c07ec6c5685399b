"""Where the files of a model's part are, on this machine or on the Hub, and what is wrong with them."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from lora_utils import UserError
from lora_utils.files import file_hash
from lora_utils.weights import WeightsError, stream_weights

Loaded = TypeVar("Loaded")
Model = TypeVar("Model", AutoencoderKL, UNet2DConditionModel)


class ModelError(UserError):
    """A base model cannot be found, read or used."""


@dataclass(frozen=True)
class Part:
    """One part of a model; every method raises ModelError when it cannot do its work."""

    model: str
    """Hub id or folder."""
    subfolder: str
    """In diffusers' layout; empty where the model is this part alone."""
    variant: str | None
    source: dict[str, Any]
    """cache_dir and perhaps revision."""

    def config(self, kind: type[AutoencoderKL] | type[UNet2DConditionModel]) -> dict[str, Any]:
        """The part's config.json."""
        subfolder = self.subfolder or None
        return explained(self.model, lambda: kind.load_config(self.model, subfolder=subfolder, **self.source))

    def fill(self, model: Model, dtype: torch.dtype, device: torch.device) -> Model:
        """Stream the part's weights into a model on the meta device."""
        explained(self.model, lambda: stream_weights(model, self._weight_files(), dtype, device))
        return model.eval()

    def identity(self, config: str = "config.json") -> str:
        """Hashes of a folder's files, or the commit on the Hub."""
        folder = Path(self.model, self.subfolder)
        if folder.is_dir():
            files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt"))
            return " ".join(file_hash(path) for path in files)
        path = explained(self.model, lambda: self._fetch(config))
        return f"{self.model}@{path.parents[1 if self.subfolder else 0].name}"  # .../snapshots/<commit>/<file>

    def _weight_files(self) -> list[Path]:
        """One file, or the shards that an index names."""
        infix = f".{self.variant}" if self.variant else ""
        try:
            index = json.loads(self._fetch(f"diffusion_pytorch_model.safetensors.index{infix}.json").read_text())
        except (FileNotFoundError, EntryNotFoundError):
            return [self._fetch(f"diffusion_pytorch_model{infix}.safetensors")]
        return [self._fetch(shard) for shard in sorted(set(index["weight_map"].values()))]

    def _fetch(self, filename: str) -> Path:
        if Path(self.model).is_dir():
            return Path(self.model, self.subfolder, filename)
        return Path(hf_hub_download(self.model, filename, subfolder=self.subfolder or None, **self.source))


def load(kind: Any, name: str, **options: Any) -> Any:
    """A library's ``from_pretrained``, its errors explained."""
    return explained(name, lambda: kind.from_pretrained(name, **options))


def explained(name: str, work: Callable[[], Loaded]) -> Loaded:
    """The result of work on a model's files.

    Raises:
        ModelError: In place of what a library raises when a file is absent, damaged or does not fit.
    """
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ModelError(
            f"there is no folder {name}; give a folder in diffusers' layout or a Hub id such as owner/name"
        )
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # From 0.42 the word is dtype, which diffusers 0.39 would ignore without a word.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            return work()
    except (OSError, HfHubHTTPError, HFValidationError, SafetensorError, WeightsError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot load {name}: {reason} (check pretrained_model_name_or_path, variant and the connection)"
        ) from error
