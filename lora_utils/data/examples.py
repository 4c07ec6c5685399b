"""What the front door hands over: examples, and remarks about everything that is not one."""

from collections.abc import Callable
from dataclasses import dataclass

from lora_utils import UserError
from lora_utils.data.findings import Finding


class DataError(UserError):
    """The training data cannot be used, or a setting about it is missing or wrong."""


@dataclass(frozen=True)
class Example:
    """One image and what it shows; nothing of the image is read yet.

    The reading functions can be pickled, as an example may be read in another process.
    """

    source: str
    """What the user knows it by: path relative to the named folder, or 'naruto[train] row 12'."""
    read: Callable[[], bytes]
    """The encoded image file. May raise ImageError."""
    captions: tuple[str, ...]
    """One or more, without the trigger word and unshuffled."""
    repeats: int = 1
    """How often an epoch shows it."""
    read_mask: Callable[[], bytes] | None = None
    """The encoded mask file, where there is one. May raise ImageError."""


@dataclass(frozen=True)
class FoundExamples:
    """All that can be learned from, and what was wrong with the rest."""

    examples: list[Example]
    findings: list[Finding]
    rule: str
    """One sentence: where images and captions came from."""
