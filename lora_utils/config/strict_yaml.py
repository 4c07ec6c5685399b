"""YAML files as a user means them: plain values by YAML 1.2, and whatever could mislead is an error.

``1e-4`` is a number, ``no`` a word, ``010`` ten and ``12:30`` a text. PyYAML only cuts the file into events;
nothing here constructs an object, follows a tag or recurses, and every limit is checked while reading.
"""

import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from lora_utils import UserError

MAX_FILE_BYTES = 128 * 1024  # PyYAML needs up to a quarter of a second for that much; it is some 2000 prompts
MAX_DEPTH = 16
MAX_VALUES = 10_000
"""Values after aliases are expanded; every 100 characters of a text count as one."""

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,300}")  # longer ones are floats, and infinite: int() would raise
_BASED_INT = re.compile(r"0o[0-7]{1,64}|0x[0-9a-fA-F]{1,64}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TIGHT_COMMENT = re.compile(r"[ \t]*(#[^\s#]\S*)")  # alpha_background: #fff
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class YamlError(UserError):
    """A file that cannot be read, or that would be read otherwise than it looks; one line."""


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that the file holds, empty for an empty file.

    Values are dict, list, str, int, float, bool and None; all keys are str.

    Raises:
        YamlError: In one line: file, line number, what is wrong and what to do.
    """
    text = _read_text(file)
    tree = _Tree(text)
    try:
        # Events alone: PyYAML's constructors, resolvers and recursion are never reached.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            tree.take(event)
    except _FoundError as error:
        raise _error(file, error.line, error.problem) from None
    except ReaderError as error:
        problem = f"there is a character U+{error.character:04X}; delete it"
        raise _error(file, text.count("\n", 0, error.position) + 1, problem) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        advice = "is it indented with spaces, and are texts with ': ', '#', brackets or quotes put in quotes?"
        raise _error(
            file, mark.line + 1 if mark else 1, f"{_clip(error.problem or error.context or '', 80)}; {advice}"
        ) from None
    except (ValueError, OverflowError):  # PyYAML turns \UFFFFFFFF and %YAML 99999… into numbers unchecked
        raise _error(file, None, "there is an escaped character or a version that does not exist") from None
    if not isinstance(tree.root, dict | None):
        raise _error(
            file, None, f"it must hold settings such as 'rank: 16', not a {type(tree.root).__name__}"
        )
    return tree.root or {}


def write_yaml(content: dict[str, Any]) -> str:
    """The content as YAML that both ``read_yaml`` and readers of YAML 1.1 understand alike."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def one_line(text: str, longest: int = 300) -> str:
    """The text with control characters escaped, and without its middle where it is too long."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return line if len(line) <= longest else f"{line[: longest * 2 // 3]} … {line[-(longest // 3 - 3) :]}"


class _Dumper(yaml.SafeDumper):
    """Quotes texts that are numbers in YAML 1.2 only, such as 1e5."""

    def text(self, text: str) -> yaml.ScalarNode:
        unusual_breaks = any(char in text for char in "\x85\u2028\u2029")  # PyYAML loses them unless escaped
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if unusual_breaks else None)


_Dumper.add_representer(str, _Dumper.text)
for _pattern in (_FLOAT, _BASED_INT):
    _Dumper.add_implicit_resolver("tag:lora-utils,2026:number", re.compile(f"(?:{_pattern.pattern})$"), None)


class _FoundError(Exception):
    def __init__(self, event: yaml.Event, problem: str) -> None:
        self.line = event.start_mark.line + 1
        self.problem = problem


@dataclass
class _Open:
    """A mapping or sequence that has not ended yet."""

    value: dict[str, Any] | list[Any]
    anchor: str | None
    values_before: int
    key: str | None = None


class _Tree:
    """Grows from events: ``root`` is the file's content after the last one."""

    def __init__(self, text: str) -> None:
        self.root: Any = None
        self._text = text
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._values = 0
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        """Add what the event says, or raise _FoundError."""
        # A tag such as !!python/object is how YAML files run code.
        if (tag := getattr(event, "tag", None)) is not None:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise _FoundError(event, f"the tag {_clip(tag)} is not allowed; write the value without it")
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _FoundError(event, "a second document begins; keep one, and leave out '---'")
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._begin(event)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            ended = self._open.pop()
            self._keep(ended.anchor, ended.value, self._values - ended.values_before)
            self._add(event, ended.value)
        elif isinstance(event, yaml.ScalarEvent):
            # Long texts count for more, so that the limit bounds memory and not just the number of values.
            self._count(event, weight := 1 + len(event.value) // 100)
            value = self._scalar(event)
            self._keep(event.anchor, value, weight)
            self._add(event, value)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _FoundError(
                    event,
                    f"*{_clip(event.anchor)} stands for nothing that ends above it; write the value out",
                )
            # An alias weighs what it stands for: ten levels of ten aliases would be ten thousand million
            # values.
            value, weight = self._anchors[event.anchor]
            self._count(event, weight)
            self._add(event, value)

    def _begin(self, event: Any) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise _FoundError(event, f"more than {MAX_DEPTH} levels are nested; settings need two")
        if self._wants_key():
            raise _FoundError(
                event, "the name of a setting cannot be a list or mapping; put a text in quotes"
            )
        before = self._values
        self._count(event, 1)
        self._open.append(
            _Open({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor, before)
        )

    def _wants_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].value, dict) and self._open[-1].key is None

    def _count(self, event: yaml.Event, weight: int) -> None:
        self._values += weight
        if self._values > MAX_VALUES:
            raise _FoundError(
                event, f"there are more than {MAX_VALUES} values, aliases expanded; make the file smaller"
            )

    def _keep(self, anchor: str | None, value: Any, weight: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = value, weight

    def _add(self, event: yaml.Event, value: Any) -> None:
        if not self._open:
            self.root = value
            return
        parent = self._open[-1]
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is not None:
            parent.value[parent.key] = value
            parent.key = None
        elif not isinstance(value, str):
            raise _FoundError(
                event, f"{_clip(repr(value))} is not the name of a setting; is a line indented too far?"
            )
        elif value == "<<":
            raise _FoundError(event, "merge keys (<<) are not supported; write the settings out")
        # YAML parsers let the last one win, and the first is silently without effect.
        elif value in parent.value:
            raise _FoundError(event, f"'{_clip(value)}' is there twice; keep one of them")
        else:
            parent.key = value

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        if event.style is None:
            if not event.value and (comment := _TIGHT_COMMENT.match(self._text, event.start_mark.index)):
                raise _FoundError(
                    event,
                    f"{_clip(comment[1])} is read as a comment; put it in quotes, or a space behind the #",
                )
            return _plain_value(event.value)
        if "\0" in event.value or any("\ud800" <= char <= "\udfff" for char in event.value):
            raise _FoundError(event, "an escaped character (\\0 or \\ud800) can be in no text; leave it out")
        return event.value


def _plain_value(text: str) -> Any:
    """A scalar without quotes, by the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        return int(text)
    if _BASED_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _NOT_FINITE.fullmatch(text):
        return float(f"{match[1] or ''}{match[2] or match[3]}")
    return text


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            # One byte more than allowed tells a file that is too large from one that just fits.
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _error(file, None, f"it cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise _error(file, None, f"it is larger than {MAX_FILE_BYTES // 1024} KiB; is it a config?")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise _error(file, None, "it is UTF-16 or no text at all; save it as UTF-8")
    try:
        # Windows' editors put a byte-order mark in front.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _error(
            file, line, f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _error(file: Path, line: int | None, problem: str) -> YamlError:
    name = str(file) if len(str(file)) <= 120 else _clip(file.name, 120)
    return YamlError(one_line(f"{name}, line {line}: {problem}" if line else f"{name}: {problem}"))


def _clip(text: str, longest: int = 40) -> str:
    """The beginning alone: the second half of a token that was cut could not be told as one."""
    return text if len(text) <= longest else f"{text[:longest]}…"
