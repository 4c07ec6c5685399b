"""Any program's LoRA, read for this U-Net: the update of each layer in one form, or why it cannot be drawn.

Every tensor of a file is used, or is told as left out, or the file is refused. Names are for ``lora_names``,
the tensors of a layer for ``lora_update``, strength that no tensor holds for ``lora_strength``, and files of
other kinds for ``lora_foreign``.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors import safe_open

from lora_utils.model.files import FAILURES
from lora_utils.model.lora_foreign import foreign_content
from lora_utils.model.lora_names import Role, layer_table, other_part, parse_name
from lora_utils.model.lora_strength import PEFT_CONFIG, PEFT_WEIGHTS, read_strength
from lora_utils.model.lora_update import AGAIN, LayerUpdate, LoraError, LoraFile, read_update

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _SortedNames:
    layers: dict[str, dict[Role, list[str]]] = field(default_factory=dict)
    """Of each layer, by its name in the U-Net, where it is known there."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many, by what they are."""


def read_updates(unet: UNet2DConditionModel, file: Path) -> dict[str, LayerUpdate]:
    """The update of each layer that the file adapts, by the layer's name in the U-Net, which stays as it is.

    Raises:
        LoraError: The file is damaged, of another kind, or made for a base model of another shape.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            strength = read_strength(file, tensors.metadata() or {})
            width = unet.config["cross_attention_dim"]
            return _read(LoraFile(file, tensors, strength, width), unet)
    except FAILURES as error:
        reason = f"{type(error).__name__}: " + " ".join(str(error).split())[:300]
        raise LoraError(f"{file} cannot be read as a LoRA ({reason}); {AGAIN}") from error


def _read(file: LoraFile, unet: UNet2DConditionModel) -> dict[str, LayerUpdate]:
    table = layer_table(unet)
    names = _sort(file, table)
    _check_whole(file, names, set(table.values()))
    updates = {}
    for layer, roles in names.layers.items():
        updates[layer] = read_update(file, roles, layer, unet.get_submodule(layer))
    _tell(file, names, updates)
    return updates


def _sort(file: LoraFile, table: Mapping[str, str]) -> _SortedNames:
    """Every tensor's use, by its name alone; nothing is read of a file that is no LoRA.

    Raises:
        LoraError: The file is of another kind, or holds nothing for a U-Net.
    """
    names = _SortedNames()
    others = []
    for name in file.tensors.keys():  # noqa: SIM118 (it is no dict)
        parsed = parse_name(name)
        if part := other_part(name):
            names.left_out[part] += 1
        elif parsed is None or name.startswith("adapter."):  # a checkpoint's, whose strength is elsewhere
            others.append(name)
        else:
            layer = table.get(parsed.layer, parsed.layer)
            names.layers.setdefault(layer, {}).setdefault(parsed.role, []).append(name)

    # An alpha alone is a leftover of some conversion, and changes nothing.
    for layer in [layer for layer, roles in names.layers.items() if roles.keys() == {"alpha"}]:
        names.left_out["of layers without an update"] += len(names.layers.pop(layer)["alpha"])

    is_lora = any(roles.keys() & {"down", "up"} for roles in names.layers.values())
    if reason := foreign_content(others, is_lora):
        raise LoraError(f"{file.path} is {reason}")
    if not names.layers:
        reason = "changes the text encoders alone" if names.left_out else "holds no LoRA for an SDXL U-Net"
        raise LoraError(f"{file.path} {reason}; choose another file as lora_path")
    if others:
        names.left_out[f"of no known use ({others[0]:.60})"] += len(others)
    return names


def _check_whole(file: LoraFile, names: _SortedNames, layers: Collection[str]) -> None:
    """Every layer is one of this U-Net's, and nothing of it is missing.

    Raises:
        LoraError: The first that is not.
    """
    needs_magnitude = file.strength is not None and file.strength.use_dora
    for layer, roles in names.layers.items():
        first = next(iter(roles.values()))[0]
        if layer not in layers:
            raise file.other_base(f"the layer of {first:.120} does not exist here")
        for half in ("down", "up"):
            if half not in roles:
                raise LoraError(f"{file.path} has no {half} beside {first:.120}; {AGAIN}")
        if needs_magnitude and not roles.keys() & {"magnitude", "dora_scale"}:
            raise LoraError(f"{file.path} is a DoRA without a magnitude beside {first:.120}; {AGAIN}")

    alphas = len(file.strength.alpha_pattern) if file.strength else 0
    if alphas > len(names.layers):  # each is tried on each layer
        raise LoraError(f"{file.path} has {alphas} alphas for {len(names.layers)} layers; {AGAIN}")


def _tell(file: LoraFile, names: _SortedNames, updates: Mapping[str, LayerUpdate]) -> None:
    if names.left_out:
        parts = [f"{count} tensor{'s'[: count - 1]} {part}" for part, count in names.left_out.items()]
        LOGGER.warning("%s: left out are %s; the U-Net's part is drawn", file.path, ", ".join(parts))
    if still := sum(not update.up.any() and update.magnitude is None for update in updates.values()):
        LOGGER.warning("%s: %d of %d layers change nothing", file.path, still, len(updates))
    if file.path.name == PEFT_WEIGHTS and file.strength is None:
        LOGGER.warning("%s: there is no %s beside it, so alpha is taken for the rank", file.path, PEFT_CONFIG)
