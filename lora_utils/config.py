"""Reads a run's settings from a file and overrides, explains what is wrong with them, and writes them down.

``--rank 8``, ``rank: 8`` under ``lora:`` in a YAML file and ``{"rank": 8}`` in a notebook mean the same.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lora_utils import UserError
from lora_utils.schema import RunConfig


class ConfigError(UserError):
    """A setting is unknown or impossible."""


def settings() -> dict[str, tuple[str, FieldInfo]]:
    """Every leaf name with its section and field."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {
        leaf: (section, field)
        for section, model in sections.items()
        if isinstance(model, type) and issubclass(model, BaseModel)
        for leaf, field in model.model_fields.items()
    }


def load_config(file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Defaults, then the file's settings, then the overrides.

    Args:
        file: YAML with sections, or with leaf names at the top level.
        overrides: Leaf name to value; strings are converted to the setting's type.

    Raises:
        ConfigError: A name is unknown or a value impossible; all problems in one message.
    """
    leaves = _flatten(_read_yaml(file), f"{file}: ") if file else {}
    wanted = _flatten(overrides or {}, "")
    leaves = _without_other_source(leaves, wanted) | wanted
    sections: dict[str, dict[str, Any]] = {}
    for leaf, value in leaves.items():
        sections.setdefault(settings()[leaf][0], {})[leaf] = value
    try:
        return RunConfig.model_validate(sections)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from None


def _without_other_source(leaves: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The file's settings less its source of data where an override names another; a Python file takes a folder too."""
    named = {**leaves, **wanted}
    if str(named.get("dataset_name") or "").endswith(".py"):
        return leaves
    sources = {"train_data_dir", "dataset_name"}
    replaced = sources - wanted.keys() if any(wanted.get(name) for name in sources) else set()
    return {name: value for name, value in leaves.items() if name not in replaced}


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"there is no config file {file}; the ready-made ones are in configs/")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file} must hold settings such as 'rank: 16', not a {type(content).__name__}")
    return content or {}


def _flatten(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if name in RunConfig.model_fields:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{where}'{name}' is a section; write its settings indented below it")
            for leaf, inner in (value or {}).items():
                if leaf in settings() and settings()[leaf][0] != name:
                    raise ConfigError(f"{where}'{leaf}' belongs under '{settings()[leaf][0]}:', not '{name}:'")
                leaves[_known(leaf, where)] = inner
        else:
            leaves[_known(name, where)] = value
    return leaves


def _known(name: object, where: str) -> str:
    if isinstance(name, str) and name in settings():
        return name
    near = difflib.get_close_matches(str(name), settings(), n=1)
    hint = f"did you mean '{near[0]}'?" if near else "docs/settings.md lists them all"
    raise ConfigError(f"{where}there is no setting '{name}'; {hint}")


def _explain(problem: Any) -> str:
    message = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if len(problem["loc"]) < 2:  # settings that do not fit together
        return message
    leaf = problem["loc"][1]
    hint = "; YAML reads no as false: write fp32" if leaf == "mixed_precision" and problem["input"] is False else ""
    return f"{leaf}: {message}, not {problem['input']!r}{hint}"
