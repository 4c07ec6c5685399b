"""What every group of settings shares: frozen, strict about names, documented below its fields."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Size = tuple[int, int]
"""Width and height in pixels."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Paths = Annotated[
    list[Path], BeforeValidator(lambda value: [value] if isinstance(value, str | Path) else value)
]
Numbers = Annotated[
    list[int], BeforeValidator(lambda value: [value] if isinstance(value, int | str) else value)
]


class Section(BaseModel):
    """A group of settings: frozen, strict about names, documented by the docstrings below its fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
