"""Which run folder settings stand for; loads no torch, because it is asked before anything else is."""

import hashlib
import itertools
import json
import logging
from pathlib import Path
from typing import Any

from lora_utils.config.schema import RunConfig
from lora_utils.config.strict_yaml import YamlError, read_yaml
from lora_utils.storage.log import CONFIG, WEIGHTS_NAME, read_summary
from lora_utils.storage.run_note import is_whole, numbered, read_note, stamp_files

LOGGER = logging.getLogger(__name__)
SETTINGS = {"model", "data", "lora", "train"}
"""Sections that decide what a run learns."""


def completed_run(config: RunConfig) -> Path | None:
    """The folder of a run that these settings describe, that is complete and whose inputs are untouched.

    Of the data and the base nothing is read but names, sizes and times. None where it takes more to say.
    """
    checkpoint = config.checkpoint
    # The mirror may lack something; "none" and a folder are wishes for another run than the one there.
    if checkpoint.mirror_dir or checkpoint.resume_from_checkpoint != "latest":
        return None
    inputs = None
    for folder in _run_folders(config):
        note = read_note(folder)
        if note is None or note.inputs is None:
            continue
        inputs = inputs or stamp_inputs(config)
        is_done = note.inputs == inputs and read_summary(folder).get("status") == "done"
        if is_done and is_whole(folder, note):
            return folder
    return None


def find_run(config: RunConfig) -> Path:
    """The folder of the run that these settings describe: output_dir, else by name, config.yaml, inputs.

    Where no run was made by these very settings, it is the newest of its name that has weights, which is
    told; where there is none at all, the folder where it would be.
    """
    first = config.paths.run_folder
    if config.paths.output_dir:
        return first
    folders = _run_folders(config)
    sections = SETTINGS
    if not config.data.train_data_dir and not config.data.dataset_name:
        # Whoever compares need not repeat the data: the preset tells which runs are meant.
        folders = [path for path in first.parent.glob("*") if _is_of_preset(path.name, first.name)]
        sections = SETTINGS - {"data"}
    folders = [path for path in folders if (path / WEIGHTS_NAME).is_file()]
    if not folders:
        return first

    wanted = _learned(config, sections)
    same = [folder for folder in folders if _learned_in(folder, sections) == wanted]
    if len(same) > 1:  # of other files: those that are here now
        inputs = stamp_inputs(config)
        notes = {folder: read_note(folder) for folder in same}
        untouched = [folder for folder, note in notes.items() if note and note.inputs == inputs]
        same = untouched or same
    newest = max(same or folders, key=lambda path: (path / WEIGHTS_NAME).stat().st_mtime)
    if not same:
        LOGGER.warning("no run has these very settings; the newest of its name is %s", newest)
    return newest


def stamp_inputs(config: RunConfig) -> str | None:
    """What stands for all that a run is made of: settings, and names, sizes and times of its files.

    None of a dataset, whose files may be elsewhere, and of folders that are not there.
    """
    names = [config.model.base, config.model.pretrained_vae_model_name_or_path]
    bases = [Path(name) for name in names if name and Path(name).is_dir()]
    folders = [*(config.data.train_data_dir or []), config.data.mask_data_dir]
    named = [folder for folder in folders if folder is not None]
    if config.data.dataset_name or not all(folder.is_dir() for folder in named):
        return None
    settings = json.dumps(_learned(config, SETTINGS), sort_keys=True)
    return hashlib.sha256(f"{settings}{stamp_files([*named, *bases])}".encode()).hexdigest()


def _run_folders(config: RunConfig) -> list[Path]:
    """The run folder that was given, else all that have its name and a number."""
    if config.paths.output_dir:
        return [config.paths.output_dir]
    return list(itertools.takewhile(Path.is_dir, numbered(config.paths.run_folder)))


def _learned(config: RunConfig, sections: set[str]) -> dict[str, Any]:
    return config.model_dump(mode="json", include=sections)


def _learned_in(folder: Path, sections: set[str]) -> dict[str, Any] | None:
    try:
        content = read_yaml(folder / CONFIG)
    except (OSError, YamlError):
        return None
    return {name: content.get(name) for name in sections}


def _is_of_preset(name: str, preset: str) -> bool:
    """Whether a folder is named after some data and this preset."""
    stem, _, number = name.rpartition("-")
    base = stem if number.isdecimal() and stem else name
    return base == preset or base.endswith(f"-{preset}")
