"""What a finished LoRA brings along: settings of the run that made it, from the config.yaml beside it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_utils.config.errors import ConfigError, explained
from lora_utils.config.schema import RUNS, RunConfig, all_settings
from lora_utils.config.strict_yaml import YamlError, read_yaml
from lora_utils.system.locations import looks_like_path

LOGGER = logging.getLogger(__name__)
BASE = "pretrained_model_name_or_path"
VAE = "pretrained_vae_model_name_or_path"
OF_BASE = (BASE, VAE, "revision", "variant")
"""Which belong together: a variant of one model's files need not exist in another's."""
CONFIG = "config.yaml"
OF_PICTURES = ("resolution", "max_token_length", "rescale_betas_zero_snr")


def run_settings(folder: Path) -> dict[str, Any] | None:
    """Leaf names and values of a run folder's config.yaml; None where the folder is none of a run."""
    file = folder / CONFIG
    if not file.is_file():
        return None
    try:
        tree = read_yaml(file)
    except YamlError as error:
        LOGGER.warning("%s; the settings are used as they are given", error)
        return None
    settings = {}
    for section in tree.values():
        # Other programs have files of this name, too, with other sections.
        if isinstance(section, Mapping):
            settings |= {leaf: value for leaf, value in section.items() if leaf in all_settings()}
    return settings if BASE in settings else None


def as_trained(config: RunConfig, settings: Mapping[str, Any], folder: Path) -> RunConfig:
    """The config with a run's settings in place of those that the user did not name.

    A preset names nothing in this sense: it is what people begin with. Who names another base gets nothing
    that belongs to the run's.

    Args:
        config: What the user said, over a preset, over defaults.
        settings: Of the run, by leaf name.
        folder: Of the run. Relative paths of its base are looked up where it was started, if that can be
            told, and in the current folder.

    Raises:
        ConfigError: A value is impossible, or a path leads to nothing.
    """
    named = {leaf for _, section in config for leaf in section.model_fields_set}
    is_other_base = BASE in named and config.model.pretrained_model_name_or_path != settings[BASE]
    wanted = OF_PICTURES if is_other_base else (*OF_BASE, *OF_PICTURES)
    tree = {name: dict(section) for name, section in config}
    for leaf in wanted:
        if leaf in settings and leaf not in named:
            value = settings[leaf]
            is_location = leaf in (BASE, VAE) and isinstance(value, str) and value != "tiny"
            if is_location:
                value = _as_from_here(value, leaf, settings, folder)
            tree[all_settings()[leaf][0]][leaf] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise explained(error.errors(include_url=False, include_context=False)) from None


def _as_from_here(name: str, leaf: str, settings: Mapping[str, Any], folder: Path) -> str:
    """A folder of models as the run meant it, or a Hub id as it is."""
    started_in = _where_started(settings, folder)
    candidates = [start / name for start in (started_in, Path()) if start is not None]
    for path in candidates:
        if path.exists():
            return str(path)
    if not looks_like_path(name):
        return name
    looked_for = " and ".join(str(path.absolute()) for path in dict.fromkeys(candidates))
    raise ConfigError(
        f"{folder / CONFIG} says that the LoRA was trained with {leaf} {name}, and there is nothing at "
        f"{looked_for}; set {leaf} to where it is now"
    )


def _where_started(settings: Mapping[str, Any], folder: Path) -> Path | None:
    """The folder that relative paths of a run start from; None where the run folder has another name now."""
    recorded = Path(str(settings.get("output_dir") or RUNS / str(settings.get("run_name"))))
    parts = recorded.parts
    whole = folder.resolve()
    if recorded.is_absolute() or not parts or whole.parts[-len(parts) :] != parts:
        return None
    return whole.parents[len(parts) - 1]
