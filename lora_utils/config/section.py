"""What every group of settings shares: frozen, strict about names, documented below its fields; its types."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lora_utils.system.redaction import ADVICE, holds_token

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})")
SEEDS_END = 2**63
"""torch takes larger seeds for negative ones, and other programs do not take them at all."""
LARGEST_COUNT = 2**31 - 1
"""Beyond, 32-bit counters of libraries overflow, long after the settings were read."""


def expanded(value: Any) -> Any:
    """A path, or a name that may be a path, with ``~`` and ``$VAR`` replaced; relative paths stay relative.

    Raises:
        ValueError: A variable is not set, or nobody has this home.
    """
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    # A folder may have a dollar in its name, and a config that was written down must mean the same again.
    if not os.path.lexists(text):
        text = _VARIABLE.sub(_value_of_variable, text)
    if not text.startswith("~"):
        return text
    home = os.path.expanduser(text)
    if home == text and not os.path.lexists(text):
        raise ValueError("begins with ~ and the name of a user who is not known here; write the whole path")
    return home


def _value_of_variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name, "")
    # An empty one would turn $DATA/cats into /cats.
    if not value.strip():
        state = "empty" if name in os.environ else "not set"
        raise ValueError(f"names the variable ${name}, which is {state}; set it, or write the whole path")
    if holds_token(value):
        raise ValueError(f"names the variable ${name}, which holds a token; {ADVICE}")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path | int | float) else value


def _possible_seed(value: int) -> int:
    if value < 0:
        raise ValueError(
            "should be 0 or more (elsewhere a negative one means random; here all can be repeated)"
        )
    if value >= SEEDS_END:
        raise ValueError("should be below 2^63")
    return value


EXPAND = BeforeValidator(expanded)
"""Marks what is a path, or may be one."""
Size = tuple[int, int]
"""Width and height in pixels."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Seed = Annotated[int, AfterValidator(_possible_seed)]
Location = Annotated[Path, EXPAND]
NameOrPath = Annotated[str, EXPAND]
"""Of the Hub, or on this disk."""
Texts = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
Paths = Annotated[list[Location], BeforeValidator(_as_list), Field(min_length=1)]
Numbers = Annotated[list[PositiveInt], BeforeValidator(_as_list), Field(min_length=1)]
Seeds = Annotated[list[Seed], BeforeValidator(_as_list), Field(min_length=1)]


class Section(BaseModel):
    """A group of settings: frozen, strict about names, documented by the docstrings below its fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
