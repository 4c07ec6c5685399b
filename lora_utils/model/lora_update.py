"""One layer's tensors in a LoRA file, made one update: up x down, with the strength in it.

Shapes: r rank. A convolution's halves have its kernel, or 1 x 1, behind; programs add and drop ones there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_utils import UserError
from lora_utils.model.lora_foreign import likely_base
from lora_utils.model.lora_names import Role, parse_name
from lora_utils.model.lora_strength import Strength

AGAIN = "train or download it again"
Roles = Mapping[Role, list[str]]
"""The tensors of a layer; a file may hold one twice, by the names of two programs."""


class LoraError(UserError):
    """An adapter cannot be attached, saved or loaded."""


@dataclass(frozen=True)
class LayerUpdate:
    """What is added to a layer's weight: up x down; all fp32."""

    down: Tensor
    """(r, inputs), of a convolution with its kernel behind."""
    up: Tensor
    """(outputs, r), of a convolution with 1 x 1 behind; the strength is multiplied in."""
    bias: Tensor | None
    """(outputs,), added to the layer's outputs (peft's lora_bias); the strength is multiplied in."""
    magnitude: Tensor | None
    """The norm of each output's weights after the update (DoRA; Liu et al., 2024, section 4).

    Shaped as peft's: (outputs,), of a convolution (1, outputs, 1, 1).
    """


@dataclass(frozen=True)
class LoraFile:
    """An open file of tensors; every method raises LoraError when it cannot do its work."""

    path: Path
    tensors: Any
    """safetensors' reader."""
    strength: Strength | None
    """What peft's settings say, in the file or beside it."""
    text_width: int
    """Of the texts that the base model's attention sees."""

    def read(self, names: list[str]) -> Tensor:
        """One tensor in fp32, whichever of its names is read."""
        tensor, *others = [self.tensors.get_tensor(name) for name in names]
        if not tensor.is_floating_point() and tensor.numel() > 1:
            raise LoraError(
                f"{names[0]:.120} in {self.path} is {tensor.dtype}, quantised in a way that is unknown here; "
                "choose the file in fp16 or fp32"
            )
        # A copy, not the mapping: fp8 can be cast and nothing else, and files are replaced while one draws.
        exact = tensor.to(torch.float32, copy=True)
        if not torch.isfinite(exact).all():
            raise LoraError(
                f"{names[0]:.120} in {self.path} is not finite; train it again with less learning_rate"
            )
        if not all(torch.equal(exact, other.to(torch.float32)) for other in others):
            raise LoraError(f"{self.path} holds two different {names[0]:.120} and {names[1]:.120}; {AGAIN}")
        return exact

    def read_number(self, names: list[str]) -> float:
        """A tensor of one number, whatever its type and shape."""
        tensor = self.read(names)
        if tensor.numel() != 1:
            raise LoraError(
                f"{names[0]:.120} in {self.path} holds {tensor.numel()} numbers, not one; {AGAIN}"
            )
        return tensor.item()

    def other_base(self, reason: str) -> LoraError:
        """That the file fits another base model, and which it seems to be."""
        shapes = {}
        for name in self.tensors.keys():  # noqa: SIM118 (it is no dict)
            parsed = parse_name(name)
            if parsed and parsed.role == "down":
                shapes[name] = self.tensors.get_slice(name).get_shape()
        seems = likely_base(shapes, self.text_width)
        return LoraError(
            f"{self.path} was made for another base model{f', {seems} it seems' if seems else ''}: {reason}; "
            "set pretrained_model_name_or_path to the model that it was trained on"
        )


def read_update(file: LoraFile, roles: Roles, layer: str, module: nn.Linear | nn.Conv2d) -> LayerUpdate:
    """The update of one layer.

    Args:
        file: Where the tensors are.
        roles: Their names; up and down are among them.
        layer: The layer's name in the U-Net.
        module: The layer; not its weight's shape is asked, as quantised weights are packed.

    Raises:
        LoraError: The tensors do not fit the layer, or each other.
    """
    down, up = _read_halves(file, roles, layer, module)
    strength = _strength(file, roles, layer, rank=down.shape[0])
    up = up * strength
    if not torch.isfinite(up).all():
        raise LoraError(f"{file.path} has a strength of {strength:g} for {layer}, too much for fp32; {AGAIN}")

    _, outputs = _widths(module)
    bias = None
    if "bias" in roles:
        bias = _fitted(file, file.read(roles["bias"]), (outputs,), layer) * strength
    magnitude = _read_magnitude(file, roles, layer, module)
    if bias is not None and magnitude is not None:
        raise LoraError(f"{file.path} is a DoRA with biases, which peft cannot hold; choose another file")
    return LayerUpdate(down, up, bias, magnitude)


def _read_halves(
    file: LoraFile, roles: Roles, layer: str, module: nn.Linear | nn.Conv2d
) -> tuple[Tensor, Tensor]:
    """Down and up in the layer's shapes, without their strength."""
    down = file.read(roles["down"])
    up = file.read(roles["up"])
    if min(down.ndim, up.ndim) < 2 or down.shape[0] == 0:
        raise LoraError(f"{file.path} holds no matrices for {layer}: {_size(down)} and {_size(up)}; {AGAIN}")

    rank, width = down.shape[:2]
    inputs, outputs = _widths(module)
    if width != inputs:
        raise file.other_base(f"{layer} takes {width} inputs in the file and {inputs} here")
    if rank != up.shape[1]:
        raise LoraError(f"{file.path} has halves of rank {rank} and {up.shape[1]} for {layer}; {AGAIN}")
    if up.shape[0] != outputs:
        raise file.other_base(f"{layer} gives {up.shape[0]} outputs in the file and {outputs} here")

    if "mid" in roles:
        down = _with_mid(file, roles, down, layer)
    kernel = module.kernel_size if isinstance(module, nn.Conv2d) else ()
    ones = (1,) * len(kernel)
    down = _fitted(file, down, (rank, inputs, *kernel), layer)
    return down, _fitted(file, up, (outputs, rank, *ones), layer)


def _with_mid(file: LoraFile, roles: Roles, down: Tensor, layer: str) -> Tensor:
    """LyCORIS' Tucker form of a convolution: 1 x 1 down, the kernel between r and r; one product of both."""
    mid = file.read(roles["mid"])
    rank = down.shape[0]
    if mid.ndim != 4 or mid.shape[:2] != (rank, rank) or down[0, 0].numel() != 1:
        raise LoraError(f"{file.path} has a mid of {_size(mid)} for {layer}, of rank {rank}; {AGAIN}")
    return torch.einsum("omhw,mi->oihw", mid, down.flatten(1))


def _strength(file: LoraFile, roles: Roles, layer: str, rank: int) -> float:
    """What up x down is multiplied by: alpha / r, and alpha is r where nothing is said."""
    scalar = file.read_number(roles["scalar"]) if "scalar" in roles else 1.0  # LyCORIS'
    if "alpha" in roles:
        return scalar * file.read_number(roles["alpha"]) / rank
    return scalar * (file.strength.factor(layer, rank) if file.strength else 1.0)


def _read_magnitude(file: LoraFile, roles: Roles, layer: str, module: nn.Linear | nn.Conv2d) -> Tensor | None:
    """DoRA's, as peft shapes it; None without DoRA."""
    names = roles.get("magnitude") or roles.get("dora_scale")
    if names is None:
        return None
    if {"magnitude", "dora_scale"} <= roles.keys():
        raise LoraError(f"{file.path} holds two magnitudes for {layer}, by two names; {AGAIN}")
    magnitude = file.read(names)
    inputs, outputs = _widths(module)
    # A convolution's from peft is (1, outputs, 1, 1). LyCORIS' and OneTrainer's has outputs, or inputs, where
    # the weight has them.
    is_peft_convolution = "magnitude" in roles and magnitude.ndim == 4 and magnitude.shape[1] == outputs
    is_by_output = magnitude.ndim > 0 and magnitude.shape[0] == outputs
    if magnitude.numel() == outputs and (is_peft_convolution or is_by_output):
        return magnitude.reshape((1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,))

    if magnitude.ndim > 1 and magnitude.shape[:2] == (1, inputs):
        raise LoraError(
            f"{file.path} is a DoRA with a magnitude for each input ({names[0]:.120}), and peft has one for "
            "each output; train it again with DoRA on the output axis, or choose a LoRA"
        )
    raise file.other_base(f"{layer} gives {outputs} outputs here, and its magnitude is {_size(magnitude)}")


def _widths(module: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    if isinstance(module, nn.Conv2d):
        return module.in_channels // module.groups, module.out_channels
    return module.in_features, module.out_features


def _fitted(file: LoraFile, tensor: Tensor, shape: Sequence[int], layer: str) -> Tensor:
    """The same numbers in the layer's own shape, which may have more or fewer ones at its end."""
    most = max(tensor.ndim, len(shape))
    padded = [tuple(size) + (1,) * (most - len(size)) for size in (tensor.shape, shape)]
    if padded[0] != padded[1]:
        raise file.other_base(f"{layer} takes {' x '.join(map(str, shape))} here, not {_size(tensor)}")
    return tensor.reshape(tuple(shape))


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"
