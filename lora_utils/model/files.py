"""Model files: one part's configuration and weights, read with suspicion and streamed onto the device.

A weight file is mapped, not read. Each tensor goes from the mapping to the device first, is cast there and
quantised there, so that the host holds nothing when the device is a GPU. On a CPU, tensors of the wanted
dtype stay in the mapping. Whatever a library raises on files that are damaged or made to do harm becomes a
ModelError.
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
from lora_utils.model.examination import ModelError, locate, plausible
from lora_utils.model.quantisation import frozen_parameter
from lora_utils.system.device_memory import is_memory_full
from lora_utils.system.files import file_hash

SHOWN_NAMES = 3  # of missing tensors, in a message
FAILURES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    SafetensorError,
)
"""What libraries raise on files that are damaged, of another kind, or made to do harm."""

Result = TypeVar("Result")
Model = TypeVar("Model", AutoencoderKL, UNet2DConditionModel)


class WeightsError(UserError):
    """Weight files do not fit the model that they are for."""


@dataclass(frozen=True)
class Part:
    """One part of a model; every method raises ModelError when it cannot do its work."""

    model: str
    """Hub id or folder."""
    subfolder: str
    """In diffusers' layout; empty where the model is this part alone."""
    variant: str | None
    """Infix of the weight files' names, such as fp16."""
    source: dict[str, Any]
    """cache_dir and perhaps revision."""

    def config(self, model_class: type[ConfigMixin]) -> dict[str, Any]:
        """The configuration of one of diffusers' classes."""
        subfolder = self.subfolder or None
        config = explained(
            self.model, lambda: model_class.load_config(self.model, subfolder=subfolder, **self.source)
        )
        return plausible(config, self.model)

    def plain_config(self) -> dict[str, Any]:
        """The config.json of one of transformers' models, checked: transformers itself would go further.

        Quantised weights and adapters go through further libraries, and an index may name files of any kind.
        """
        return explained(self.model, self._read_plain_config)

    def build(self, model_class: type[Model], config: dict[str, Any]) -> Model:
        """A model of this configuration on the meta device, without weights."""
        with torch.device("meta"):
            return cast(Model, explained(self.model, lambda: model_class.from_config(config)))

    def fill(self, model: Model, dtype: torch.dtype, device: torch.device) -> Model:
        """Stream the part's weights into a model on the meta device."""
        explained(self.model, lambda: stream_weights(model, self._weight_files(), dtype, device))
        return model.eval()

    def identity(self, config: str = "config.json") -> str:
        """Hashes of a folder's files, or the commit on the Hub.

        Args:
            config: A file that the part has on the Hub.
        """
        folder = Path(self.model, self.subfolder)
        if folder.is_dir():  # its content, not its path: a copy elsewhere is the same model
            return explained(self.model, lambda: _hashes(folder))

        path = explained(self.model, lambda: self._fetch(config))
        commit = path.parents[1 if self.subfolder else 0].name  # .../snapshots/<commit>/<subfolder>/<file>
        return f"{self.model}@{commit}"

    def _weight_files(self, stem: str = "diffusion_pytorch_model") -> list[Path]:
        """One file, or the shards that an index names."""
        infix = f".{self.variant}" if self.variant else ""
        index = self._find(f"{stem}.safetensors.index{infix}.json")
        if index is None:
            return [self._fetch(f"{stem}{infix}.safetensors")]

        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for shard in shards:
            # An index is data: it may point to a pickle, or out of the model's folder.
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise WeightsError(
                    f"{index.name} names {shard!s:.60}, which is no safetensors file beside it"
                )
        return [self._fetch(shard) for shard in shards]

    def _read_plain_config(self) -> dict[str, Any]:
        config = plausible(json.loads(self._fetch("config.json").read_text(encoding="utf-8")), self.model)
        if "quantization_config" in config or self._find("adapter_config.json"):
            raise ModelError(
                f"{self.subfolder} of {self.model} is quantised or adapted; choose the plain model"
            )
        self._weight_files("model")  # transformers will read them; here an index of other files is refused
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


def load(library_class: Any, name: str, **options: Any) -> Any:
    """A library's ``from_pretrained``, its errors explained."""
    return explained(name, lambda: library_class.from_pretrained(name, **options))


def explained(name: str, read: Callable[[], Result]) -> Result:
    """What reading a model's files gives.

    Raises:
        ModelError: In place of what a library raises when a file is absent, damaged or does not fit.
    """
    locate(name)  # libraries take whatever is no folder for a Hub id, and then complain of its spelling
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # From 0.42 the word is dtype, which diffusers 0.39 would ignore without a word.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            return read()
    except (WeightsError, HfHubHTTPError, StrictDataclassError, *FAILURES) as error:
        if is_memory_full(error):
            raise  # nothing is wrong with the files
        # These two explain themselves; the text of others, of a KeyError say, means little without its class.
        prefix = "" if isinstance(error, WeightsError | OSError) else f"{type(error).__name__}: "
        reason = prefix + " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot load {name}: {reason} (check pretrained_model_name_or_path, variant and the connection)"
        ) from error


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
                expected = missing.pop(name, None)
                if expected is None:  # the model has no use for it
                    continue
                shape = tuple(tensors.get_slice(name).get_shape())  # from the header, before anything is read
                if shape != tuple(expected.shape):
                    raise WeightsError(f"{name} has shape {shape}, and {tuple(expected.shape)} was expected")

                # To the device first and cast there: the other way round, the host would hold the cast copy.
                tensor = tensors.get_tensor(name).to(device).to(dtype)
                path, _, leaf = name.rpartition(".")
                module = model.get_submodule(path)
                module.register_parameter(leaf, frozen_parameter(module, leaf, tensor))
    if missing:  # else they would stay on meta, and the first forward pass would fail without a name
        others = f" and {len(missing) - SHOWN_NAMES} more" if len(missing) > SHOWN_NAMES else ""
        names = ", ".join(list(missing)[:SHOWN_NAMES])
        raise WeightsError(f"{names}{others} are missing from the weight files")


def _hashes(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt"))
    return " ".join(file_hash(path) for path in files if path.is_file())
