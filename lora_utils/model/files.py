"""Weights from safetensors into a model, one tensor at a time, without a copy of the file in memory.

A file is mapped, not read. Each tensor goes from the mapping to the device first, is cast there and quantised there, so
that the host holds nothing when the device is a GPU. On a CPU, tensors of the wanted dtype stay in the mapping.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, ConfigMixin, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from lora_utils import UserError
from lora_utils.model.quantisation import frozen_parameter
from lora_utils.system.files import file_hash

SHOWN = 3
FAILURES = (
    *(
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        AssertionError,
    ),
    *(ImportError, SafetensorError),
)
"""What libraries raise on files that are damaged, of another kind, or made to do harm."""


class WeightsError(UserError):
    """Weight files do not fit the model that they are for."""


def stream_weights(model: nn.Module, files: Iterable[Path], dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model that was built on the meta device; every parameter comes frozen.

    Args:
        model: Its quantised linears get quantised weights.
        files: One or several (shards), safetensors, any float dtype.
        dtype: Of what is not quantised, and what is quantised passes through it.
        device: Where the model will stay.

    Raises:
        WeightsError: A tensor is missing or has another shape.
        SafetensorError, OSError: A file is damaged or absent.
    """
    missing = dict(model.named_parameters())
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                old = missing.pop(name, None)
                if old is None:
                    continue
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != tuple(old.shape):
                    raise WeightsError(f"{name} has shape {shape}, and {tuple(old.shape)} was expected")
                path, _, leaf = name.rpartition(".")
                module = model.get_submodule(path)
                parameter = frozen_parameter(module, leaf, tensors.get_tensor(name).to(device).to(dtype))
                module.register_parameter(leaf, parameter)
    if missing:
        others = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise WeightsError(f"{', '.join(list(missing)[:SHOWN])}{others} are missing from the weight files")


Loaded = TypeVar("Loaded")
Model = TypeVar("Model", AutoencoderKL, UNet2DConditionModel)
GREATEST_NUMBER = 2**20
MOST_LAYERS = 32  # SDXL's second text encoder has as many
MOST_PARTS = 16


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

    def config(self, kind: type[ConfigMixin]) -> dict[str, Any]:
        """The configuration of one of diffusers' classes."""
        subfolder = self.subfolder or None
        found = explained(
            self.model, lambda: kind.load_config(self.model, subfolder=subfolder, **self.source)
        )
        return _plausible(found, self.model)

    def plain_config(self) -> dict[str, Any]:
        """The config.json of one of transformers' models, which would read more than that and safetensors files.

        Quantised weights and adapters go through further libraries, and an index may name files of any kind.
        """
        return explained(self.model, self._read_plain_config)

    def build(self, kind: type[Model], config: dict[str, Any]) -> Model:
        """A model of this configuration on the meta device, without weights."""
        with torch.device("meta"):
            return cast(Model, explained(self.model, lambda: kind.from_config(config)))

    def fill(self, model: Model, dtype: torch.dtype, device: torch.device) -> Model:
        """Stream the part's weights into a model on the meta device."""
        explained(self.model, lambda: stream_weights(model, self._weight_files(), dtype, device))
        return model.eval()

    def identity(self, config: str = "config.json") -> str:
        """Hashes of a folder's files, or the commit on the Hub."""
        folder = Path(self.model, self.subfolder)
        if folder.is_dir():
            return explained(self.model, lambda: _hashes(folder))
        path = explained(self.model, lambda: self._fetch(config))
        return (
            f"{self.model}@{path.parents[1 if self.subfolder else 0].name}"  # .../snapshots/<commit>/<file>
        )

    def _weight_files(self, stem: str = "diffusion_pytorch_model") -> list[Path]:
        """One file, or the shards that an index names."""
        infix = f".{self.variant}" if self.variant else ""
        index = self._find(f"{stem}.safetensors.index{infix}.json")
        if index is None:
            return [self._fetch(f"{stem}{infix}.safetensors")]
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise WeightsError(
                    f"{index.name} names {shard!s:.60}, which is no safetensors file beside it"
                )
        return [self._fetch(shard) for shard in shards]

    def _read_plain_config(self) -> dict[str, Any]:
        config = _plausible(json.loads(self._fetch("config.json").read_text()), self.model)
        if "quantization_config" in config or self._find("adapter_config.json"):
            raise ModelError(
                f"{self.subfolder} of {self.model} is quantised or adapted; choose the plain model"
            )
        self._weight_files("model")
        return config

    def _find(self, filename: str) -> Path | None:
        try:
            return self._fetch(filename)
        except (FileNotFoundError, EntryNotFoundError):
            return None

    def _fetch(self, filename: str) -> Path:
        if not Path(self.model).is_dir():
            return Path(
                hf_hub_download(self.model, filename, subfolder=self.subfolder or None, **self.source)
            )
        path = Path(self.model, self.subfolder, filename)
        if not path.is_file():  # a pipe would wait for ever
            raise FileNotFoundError(f"there is no file {path}")
        return path


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
    except torch.OutOfMemoryError:
        raise  # the card is too small, and nothing is wrong with the files
    except (WeightsError, HfHubHTTPError, StrictDataclassError, *FAILURES) as error:
        kind = "" if isinstance(error, WeightsError | OSError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot load {name}: {reason} (check pretrained_model_name_or_path, variant and the connection)"
        ) from error


def _plausible(config: Any, model: str) -> dict[str, Any]:
    """A configuration that builds in a moment: a number can ask for more memory than there is."""
    for name, value in config.items():
        values, most = [value], MOST_LAYERS if "layers" in name else GREATEST_NUMBER
        while values:
            value = values.pop()
            if isinstance(value, list) and (len(value) <= MOST_PARTS or name == "trained_betas"):
                values += value
            elif isinstance(value, list) or (isinstance(value, int) and abs(value) > most):
                raise ModelError(
                    f"cannot load {model}: its {name} is larger than SDXL's can be; choose another"
                )
    return config


def _hashes(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt"))
    return " ".join(file_hash(path) for path in files if path.is_file())
