"""Names that are none of a setting: all of them at once, each with what it may have meant."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from lora_utils.config.errors import ConfigError
from lora_utils.config.foreign_names import answer_to
from lora_utils.config.schema import RunConfig, all_settings
from lora_utils.system.redaction import ADVICE

MOST_NAMES = 60
"""Unknown ones that one message answers: a whole command of another trainer has some forty."""
NEAR = 0.8
"""Likeness of two names, by difflib, from which one may be the other mistyped; 0.6 finds strange pairs."""


def unknown_names(tree: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """Where and what: every name in the tree that is none of a section or setting."""
    for name, value in tree.items():
        if name not in all_settings() and name not in RunConfig.model_fields:
            yield where, str(name)
        if name not in all_settings() and isinstance(value, Mapping):
            yield from unknown_names(value, where)


def refuse_unknown(names: list[tuple[str, str]]) -> None:
    """Nothing, where there are none; else say what each may have meant.

    Raises:
        ConfigError: There are some.
    """
    if len(names) == 1:
        where, name = names[0]
        raise ConfigError(f"{where}there is no setting '{name}'; {_answer(name)}")
    if names:
        lines = [f"  {where}{name}: {_answer(name)}" for where, name in names[:MOST_NAMES]]
        more = [f"  and {len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
        raise ConfigError(f"there are no settings of these {len(names)} names:", *lines, *more)


def _answer(name: str) -> str:
    """What to write instead of a name that is none of a setting."""
    if answer := answer_to(name):
        return answer
    if name.endswith(("token", "api_key", "password", "secret")) and not name.startswith("keep"):
        return ADVICE
    plain = name.lower().replace("-", "_")
    switch = all_settings().get(plain.removeprefix("no_"))
    if switch and switch[1].annotation is bool:
        return f"{plain.removeprefix('no_')}=false switches it off"
    near = difflib.get_close_matches(plain, all_settings(), n=1, cutoff=NEAR)
    return f"did you mean '{near[0]}'?" if near else "docs/settings.md lists them all"
