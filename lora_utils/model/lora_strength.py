"""The strength of a LoRA whose tensors do not hold it: peft's settings, in the file or beside it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

METADATA_KEY = "lora_adapter_metadata"  # diffusers'
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


class Strength(pydantic.BaseModel):
    """What an adapter's file may set of peft's configuration; rank, layers and bias are its tensors'.

    Other fields name modules to import, or hold patterns that take for ever to match.
    """

    lora_alpha: pydantic.FiniteFloat
    alpha_pattern: dict[
        Annotated[str, pydantic.StringConstraints(pattern=r"^\^?[\w.]+$")], pydantic.FiniteFloat
    ] = {}
    use_rslora: bool = False
    use_dora: bool = False

    def factor(self, layer: str, rank: int) -> float:
        """What up x down is multiplied by."""
        alpha = next((alpha for name, alpha in self.alpha_pattern.items() if _fits(name, layer)), None)
        alpha = self.lora_alpha if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_strength(file: Path, metadata: Mapping[str, str]) -> Strength | None:
    """The settings for the U-Net; None where there are none.

    Args:
        file: The LoRA; peft keeps its settings in a file beside it.
        metadata: Of the file itself, where diffusers keeps them.

    Raises:
        ValueError: They are no settings of peft's.
    """
    given: Any = {}
    if METADATA_KEY in metadata:
        given = json.loads(metadata[METADATA_KEY])
    elif file.name == PEFT_WEIGHTS and file.with_name(PEFT_CONFIG).is_file():
        settings = json.loads(file.with_name(PEFT_CONFIG).read_text(encoding="utf-8"))
        given = {f"unet.{name}": value for name, value in settings.items()}
    if not isinstance(given, dict):
        raise ValueError("the settings of the adapter are no mapping")

    settings = {
        name.removeprefix("unet."): value for name, value in given.items() if name.startswith("unet.")
    }
    if settings.get("peft_type", "LORA") != "LORA":  # its tensors' names say what it is
        return None
    return Strength.model_validate(settings) if settings else None


def _fits(name: str, layer: str) -> bool:
    """As peft matches its patterns: a whole name, or its end."""
    return layer == name.removeprefix("^") or (not name.startswith("^") and layer.endswith(f".{name}"))
