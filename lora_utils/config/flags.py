"""Settings on a command line: ``--rank 8``, ``--rank=8``, ``--prompt a b --prompt c``, ``--use_dora``.

Not as argparse does it: to it -1e-4 is a flag, the last of two values wins, and so does the last list.
"""

import re
from collections import deque
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from lora_utils.config.errors import ConfigError
from lora_utils.config.schema import all_settings

_OTHER_DASHES = re.compile(r"(?:-|[\u2010-\u2015\u2212]+-*|-[\u2010-\u2015\u2212]+)(?=\w)")


def read_flags(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings among the words, as ``load_config`` takes them, and all other words in their order.

    Raises:
        ConfigError: A flag has no value, or two different ones.
    """
    values: dict[str, list[str]] = {}
    others: list[str] = []
    waiting = deque(words)
    while waiting:
        word = waiting.popleft()
        name, equals, value = word.partition("=")
        leaf = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or leaf not in all_settings():
            _refuse_other_dashes(name)
            others.append(word)
            continue
        field = all_settings()[leaf][1]
        given = [value] if equals else _take(leaf, field, waiting)
        before = values.get(leaf, given if not _adds_up(field) else [])
        if not _adds_up(field) and before != given:
            raise ConfigError(
                f"--{leaf} is there twice, as {' '.join(before)} and {' '.join(given)}; keep one"
            )
        values[leaf] = before + given if _adds_up(field) else given
    return {leaf: given[0] if len(given) == 1 else given for leaf, given in values.items()}, others


def _take(leaf: str, field: FieldInfo, waiting: deque[str]) -> list[str]:
    """The words after a flag that are its values."""
    given = []
    while waiting and not _is_flag(waiting[0]):
        given.append(waiting.popleft())
        if not _takes_several(field):
            break
    if given:
        return given
    if _is_switch(field):
        return ["true"]  # diffusers' bare flags
    raise ConfigError(f"--{leaf} has no value; write --{leaf}=VALUE")


def _is_flag(word: str) -> bool:
    # A single dash begins values too, such as -1e-4.
    _refuse_other_dashes(word.partition("=")[0])
    return word == "-h" or re.match(r"--\w", word) is not None


def _refuse_other_dashes(name: str) -> None:
    """Say it where a setting follows one dash, or the long dash that text editors make of two."""
    leaf = _OTHER_DASHES.sub("", name, count=1).replace("-", "_")
    if _OTHER_DASHES.match(name) and leaf in all_settings():
        raise ConfigError(f"{name} begins with other dashes than a flag does; write --{leaf}")


def _takes_several(field: FieldInfo) -> bool:
    return _holds(field.annotation, (list, tuple))


def _adds_up(field: FieldInfo) -> bool:
    """Whether a second use adds values to the first; two resolutions are no list."""
    return _holds(field.annotation, (list,))


def _holds(annotation: Any, origins: tuple[type, ...]) -> bool:
    return get_origin(annotation) in origins or any(_holds(part, origins) for part in get_args(annotation))


def _is_switch(field: FieldInfo) -> bool:
    """Whether the flag alone means something: true, or of gradient_checkpointing full."""
    return field.annotation is bool or {"auto", "full"} <= {*map(str, get_args(field.annotation))}
