"""What the front door hands over: examples, and remarks about everything that is not one."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lora_utils import UserError
from lora_utils.findings import Finding


class DataError(UserError):
    """The training data cannot be used, or a setting about it is missing or wrong."""


@dataclass(frozen=True)
class Example:
    """One image and what it shows; nothing of the image is read yet."""

    source: str
    """What the user knows it by: path relative to the named folder, or 'naruto[train] row 12'."""
    read: Callable[[], bytes]
    """The encoded image file. May raise ImageError."""
    captions: tuple[str, ...]
    """One or more, without the trigger word and unshuffled."""
    repeats: int = 1
    """How often an epoch shows it."""
    read_mask: Callable[[], bytes] | None = None
    """The encoded mask file, where there is one."""


@dataclass(frozen=True)
class Found:
    """All that can be learned from, and what was wrong with the rest."""

    examples: list[Example]
    findings: list[Finding]
    rule: str
    """One sentence: where images and captions came from."""


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    problem: str
    action: str


@dataclass
class Remarks:
    """Collects findings while data is looked through."""

    _named: list[Finding] = field(default_factory=list)
    _tallied: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def refuse(self, source: str, problem: str, action: str) -> None:
        """It is left out."""
        self._add(source, problem, action, "refused")

    def fix(self, source: str, problem: str, action: str) -> None:
        """It is used after a change."""
        self._add(source, problem, action, "fixed")

    def notice(self, source: str, problem: str, action: str) -> None:
        """It is used as it is."""
        self._add(source, problem, action, "noticed")

    def tally(self, source: str, problem: str, action: str) -> None:
        """A notice that counts its sources in a single line, for what may well be meant."""
        self._tallied.setdefault((problem, action), []).append(source)

    def findings(self) -> list[Finding]:
        """Everything so far, the counted notices last."""
        counted = [
            Finding(
                showable(sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"),
                showable(problem),
                action,
                "noticed",
            )
            for (problem, action), sources in self._tallied.items()
        ]
        return self._named + counted

    def _add(self, source: str, problem: str, action: str, kind: Literal["refused", "fixed", "noticed"]) -> None:
        self._named.append(Finding(showable(source), showable(problem), showable(action), kind))


def showable(text: str) -> str:
    """Text from outside, with control characters and lone surrogates escaped: neither may reach a terminal."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in ("Cc", "Cs") else char for char in text
    )
