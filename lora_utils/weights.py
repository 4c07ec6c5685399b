"""Weights from safetensors into a model, one tensor at a time, without a copy of the file in memory.

A file is mapped, not read. Each tensor goes from the mapping to the device first, is cast there and quantised there, so
that the host holds nothing when the device is a GPU. On a CPU, tensors of the wanted dtype stay in the mapping.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lora_utils import UserError
from lora_utils.quantisation import frozen_parameter

SHOWN = 3
FAILURES = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError),
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
