"""Reads a run's settings from a file and overrides, and writes them down.

``--rank 8``, ``rank: 8`` under ``lora:`` in a YAML file and ``{"rank": 8}`` in a notebook mean the same.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lora_utils.config.errors import ConfigError, explained
from lora_utils.config.foreign_names import answer_to
from lora_utils.config.names import refuse_unknown, unknown_names
from lora_utils.config.run_name import default_run_name
from lora_utils.config.schema import RunConfig, all_settings
from lora_utils.config.section import EXPAND, expanded
from lora_utils.config.strict_yaml import YamlError, one_line, read_yaml, write_yaml
from lora_utils.system.redaction import ADVICE, holds_token, without_tokens

PRESETS = Path(__file__).parents[1] / "presets"
NONE = "none"
"""Of a text that must not be null: what stands for it."""
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # what the shell hands over for bytes that are no UTF-8
# Of each group, what an override names takes the place of what the file says of the others.
RIVALS = (("train_data_dir", "dataset_name"), ("max_train_steps", "num_train_epochs"))


def presets() -> list[str]:
    """Names of the ready-made settings that come with the package."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file that ``--config NAME`` means: a preset for the bare name of one, such as t4, else a path.

    Raises:
        ConfigError: The path names a variable or a home that is not there, or nothing.
    """
    if str(name) in presets():
        return PRESETS / f"{name}.yaml"
    if _is_blank(str(name)):
        raise ConfigError(f"the config's name is empty; name a file, or a preset: {', '.join(presets())}")
    try:
        return Path(expanded(name))
    except ValueError as error:
        raise ConfigError(f"config {name}: {error}") from None


def load_config(file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Defaults, then the file's settings, then the overrides.

    Args:
        file: YAML with sections, or with leaf names at the top level.
        overrides: Leaf name to value; strings are converted to the setting's type.

    Raises:
        ConfigError: A name is unknown, a value impossible or a token; the first problems in one line.
    """
    tree = _read_yaml(file) if file else {}
    # All unknown names of both in one message: with one at a time, a long command takes a long evening.
    refuse_unknown([*unknown_names(tree, f"{file}: "), *unknown_names(overrides or {}, "")])
    leaves = _flatten(tree, f"{file}: ")
    wanted = _flatten(overrides or {}, "")

    # Before pydantic sees them: its messages quote values, and one may be a token.
    _refuse_misplaced(leaves)
    _refuse_misplaced(wanted)
    leaves = _as_meant(leaves)
    wanted = _as_meant(wanted)
    leaves = _without_rivals(leaves, wanted) | wanted
    if not leaves.get("run_name"):
        leaves["run_name"] = default_run_name(leaves, file)
    sections: dict[str, dict[str, Any]] = {}
    for leaf, value in leaves.items():
        sections.setdefault(all_settings()[leaf][0], {})[leaf] = value
    # A preset is what people begin with: what it says is theirs no more than a default is.
    named = wanted if file and file.parent == PRESETS else leaves
    try:
        return _with_named(RunConfig.model_validate(sections), named)
    except ValidationError as error:
        # Not "from error": a traceback of pydantic's would quote every value once more.
        raise explained(error.errors(include_url=False, include_context=False)) from None


def _with_named(config: RunConfig, named: Collection[str]) -> RunConfig:
    """The same config, where ``model_fields_set`` of each section holds what the user named alone."""
    for _, section in config:
        section.model_fields_set.intersection_update(named)
    return config


def _without_rivals(leaves: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The file's settings without those that an override decides otherwise under another name.

    A preset's data set must not stand beside the folder that the user names instead, nor its number of steps
    overrule the user's number of epochs.
    """
    named = {**leaves, **wanted}
    replaced: set[str] = set()
    for group in RIVALS:
        rivals = set(group)
        # A Python file takes a folder as its data_dir: there the two are no rivals.
        if "dataset_name" in rivals and str(named.get("dataset_name") or "").endswith(".py"):
            continue
        if any(wanted.get(name) for name in rivals):
            replaced |= rivals - wanted.keys()
    return {name: value for name, value in leaves.items() if name not in replaced}


def _as_meant(leaves: dict[str, Any]) -> dict[str, Any]:
    """The same settings, where null, none and an empty text mean "not given".

    Raises:
        ConfigError: One must have a value.
    """
    meant = {}
    for leaf, value in leaves.items():
        field = all_settings()[leaf][1]
        # An unset shell variable among several folders: an empty path would be the current folder.
        if isinstance(value, list | tuple) and _is_path(field):
            value = [item for item in value if not _is_blank(item)]
        if _is_blank(value) and _is_path(field) and not _can_be_unset(field):
            continue  # as if it had not been written: what the file or the default says stays
        meant[leaf] = _unset(leaf, field, value) if _is_blank(value) or _is_none(value) else value
    return meant


def _is_blank(value: Any) -> bool:
    return value == [] or (isinstance(value, str) and not value.strip())


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))


def _is_path(field: FieldInfo) -> bool:
    return EXPAND in field.metadata or EXPAND in _parts(field.annotation)


def _can_be_unset(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation) or field.default == NONE


def _unset(leaf: str, field: FieldInfo, value: Any) -> Any:
    """What a setting becomes that is given as nothing."""
    # Where none is one of the choices, it is meant.
    if isinstance(value, str) and value.strip().lower() in get_args(field.annotation):
        return value.strip().lower()
    if not _can_be_unset(field):
        raise ConfigError(
            f"{leaf}: must have a value, and is {one_line(repr(value))}; leave it out, or set it"
        )
    return field.default if _is_blank(value) or field.default == NONE else None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that ``load_config`` reads back; a token that got past it is masked."""
    return without_tokens(write_yaml(config.model_dump(mode="json")))


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
    """Leaf names to values, of a tree whose names are all known."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in RunConfig.model_fields:
            _put(leaves, name, value, where)
            continue
        if not isinstance(value, Mapping | None):
            answer = answer_to(name)
            meant = f"; {answer}" if answer else ""
            raise ConfigError(f"{where}'{name}' is a section; write its settings indented below it{meant}")
        for leaf, inner in (value or {}).items():
            section = all_settings()[leaf][0] if leaf in all_settings() else "the top"
            # Leaf names are unique, so the right section is known: say it instead of "unknown".
            if section != name:
                raise ConfigError(f"{where}'{leaf}' belongs under '{section}:', not '{name}:'")
            _put(leaves, leaf, inner, where)
    return leaves


def _put(leaves: dict[str, Any], leaf: str, value: Any, where: str) -> None:
    # In its section and at the top: which of both is meant must not be guessed.
    if leaf in leaves and leaves[leaf] != value:
        raise ConfigError(f"{where}'{leaf}' is there twice, with other values; keep one of them")
    leaves[leaf] = value


def _refuse_misplaced(leaves: Mapping[str, Any]) -> None:
    """Refuse tokens, texts that no file can hold, and several values where a setting takes one."""
    if holds_token(str(leaves)):
        named = [leaf for leaf, value in leaves.items() if holds_token(str(value))]
        raise ConfigError(f"{' and '.join(named) or 'a setting'} holds a token or another secret; {ADVICE}")
    for leaf, value in leaves.items():
        several = isinstance(value, list | tuple | set)
        if isinstance(value, Mapping) or (several and not _takes_several(all_settings()[leaf][1].annotation)):
            raise ConfigError(f"{leaf}: takes one value, not {one_line(repr(value), 60)}")
        for text in value if several else [value]:
            # A folder's name may be any bytes; what is encoded or written may not.
            is_name = isinstance(text, Path) and "\0" not in str(text)
            if _UNWRITABLE.search(str(text)) and not is_name:
                shown = one_line(repr(str(text)), 60)
                raise ConfigError(f"{leaf}: holds bytes that are no UTF-8, or a null: {shown}; write it anew")


def _takes_several(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple) or any(map(_takes_several, get_args(annotation)))


def _parts(annotation: Any) -> Iterator[Any]:
    """What a type is made of: Location | None has Path in it, and the marks of Location."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
