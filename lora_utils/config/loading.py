"""Reads a run's settings from a file and overrides, explains what is wrong with them, and writes them down.

``--rank 8``, ``rank: 8`` under ``lora:`` in a YAML file and ``{"rank": 8}`` in a notebook mean the same.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lora_utils import UserError
from lora_utils.config.run_name import default_run_name
from lora_utils.config.schema import RunConfig
from lora_utils.config.strict_yaml import YamlError, one_line, read_yaml, write_yaml
from lora_utils.system.redaction import ADVICE, holds_secret, redacted

PRESETS = Path(__file__).parents[1] / "presets"
MOST_PROBLEMS = 3
"""That one message tells; the others are counted."""


class ConfigError(UserError):
    """A setting is unknown or impossible; one line, without secrets."""

    def __init__(self, message: str) -> None:
        """Take a message that may quote what the user wrote."""
        super().__init__(one_line(redacted(message)))


@cache
def all_settings() -> dict[str, tuple[str, FieldInfo]]:
    """Every leaf name with its section and field."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {
        leaf: (section, field)
        for section, model in sections.items()
        if isinstance(model, type) and issubclass(model, BaseModel)
        for leaf, field in model.model_fields.items()
    }


def describe(field: FieldInfo) -> str:
    """What a setting does, on one line: the docstring below its field."""
    return " ".join(str(field.description).split())


def presets() -> list[str]:
    """Names of the ready-made settings that come with the package."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file that ``--config NAME`` means: a preset for the bare name of one, such as t4, else a path."""
    return PRESETS / f"{name}.yaml" if str(name) in presets() else Path(name)


def load_config(file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Defaults, then the file's settings, then the overrides.

    Args:
        file: YAML with sections, or with leaf names at the top level.
        overrides: Leaf name to value; strings are converted to the setting's type.

    Raises:
        ConfigError: A name is unknown, a value impossible or a token; the first problems in one line.
    """
    leaves = _flatten(_read_yaml(file), f"{file}: ") if file else {}
    wanted = _flatten(overrides or {}, "")
    # A preset's data set must not stand beside the folder that the user names instead.
    leaves = _without_other_source(leaves, wanted) | wanted
    # Before pydantic sees them: its messages quote values, and one may be a token.
    _refuse_misplaced(leaves)
    if not leaves.get("run_name"):
        leaves["run_name"] = default_run_name(leaves, file)
    sections: dict[str, dict[str, Any]] = {}
    for leaf, value in leaves.items():
        sections.setdefault(all_settings()[leaf][0], {})[leaf] = value
    try:
        return RunConfig.model_validate(sections)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        # Not "from error": a traceback of pydantic's would quote every value once more.
        raise ConfigError("; ".join(map(_explain, problems[:MOST_PROBLEMS])) + more) from None


def _without_other_source(leaves: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The file's settings without its source of data, where an override names another one."""
    named = {**leaves, **wanted}
    if str(named.get("dataset_name") or "").endswith(".py"):
        return leaves
    sources = {"train_data_dir", "dataset_name"}
    replaced = sources - wanted.keys() if any(wanted.get(name) for name in sources) else set()
    return {name: value for name, value in leaves.items() if name not in replaced}


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that ``load_config`` reads back; a secret that got past it is masked."""
    return redacted(write_yaml(config.model_dump(mode="json")))


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(
            f"there is no config file {file}; give the path of one, or a preset: {', '.join(presets())}"
        )
    try:
        return read_yaml(file)
    except YamlError as error:
        raise ConfigError(str(error)) from None


def _flatten(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if name in RunConfig.model_fields:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{where}'{name}' is a section; write its settings indented below it")
            for leaf, inner in (value or {}).items():
                # Leaf names are unique, so the right section is known: say it instead of "unknown".
                if leaf in all_settings() and all_settings()[leaf][0] != name:
                    raise ConfigError(
                        f"{where}'{leaf}' belongs under '{all_settings()[leaf][0]}:', not '{name}:'"
                    )
                leaves[_known(leaf, where)] = inner
        else:
            leaves[_known(name, where)] = value
    return leaves


def _known(name: object, where: str) -> str:
    if isinstance(name, str) and name in all_settings():
        return name
    if str(name).endswith(("token", "api_key", "password", "secret")) and not str(name).startswith("keep"):
        raise ConfigError(f"{where}there is no setting '{name}'; {ADVICE}")
    near = difflib.get_close_matches(str(name), all_settings(), n=1)
    hint = f"did you mean '{near[0]}'?" if near else "docs/settings.md lists them all"
    raise ConfigError(f"{where}there is no setting '{name}'; {hint}")


def _refuse_misplaced(leaves: Mapping[str, Any]) -> None:
    """Refuse tokens, and several values where a setting takes one: validators need not expect a list."""
    if holds_secret(str(leaves)):
        named = [leaf for leaf, value in leaves.items() if holds_secret(str(value))]
        raise ConfigError(f"{' and '.join(named) or 'a setting'} holds a token or another secret; {ADVICE}")
    for leaf, value in leaves.items():
        several = isinstance(value, list | tuple | set)
        if isinstance(value, Mapping) or (several and not _takes_several(all_settings()[leaf][1].annotation)):
            raise ConfigError(f"{leaf}: takes one value, not {one_line(repr(value), 60)}")


def _takes_several(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple) or any(map(_takes_several, get_args(annotation)))


def _explain(problem: Any) -> str:
    message = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    # A validator of a whole section: its message names the settings by itself.
    if len(problem["loc"]) < 2:  # settings that do not fit together
        return message
    leaf = problem["loc"][1]
    value = problem["input"]
    hint = ""
    if leaf == "mixed_precision" and value in (False, "no"):
        hint = "; full precision is fp32"
    elif problem["type"] == "string_type" and isinstance(value, int | float):
        hint = "; put it in quotes"
    return f"{leaf}: {message}, not {one_line(repr(value), 60)}{hint}"
