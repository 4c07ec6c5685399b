"""Trials in the result file, as long as what they were carried out with is what is here."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.record import read, write
from benchmarks.targets.trials import PROMPTS, Trial, digest_of
from benchmarks.targets.ways import EVERY_WAY
from lora_utils.system.files import file_hash
from lora_utils.tiny import judge
from lora_utils.tiny.evaluate import FOLDER, LORA_GUIDANCE
from lora_utils.tiny.evaluate import STEPS as SAMPLER_STEPS

NAME = "targets"


def finished(work: Path) -> dict[str, dict[str, Any]]:
    """Figures of trials by key, where they stand on the base, pictures, judge and settings that are here.

    Args:
        work: With the data sets, in folders named by their content.
    """
    kept = read(NAME)
    trials = kept["figures"]["trials"] if kept else {}
    return {key: figures for key, figures in trials.items() if _stands(figures, work)}


def stands_on(trial: Trial, work: Path) -> dict[str, str]:
    """What a trial's figures are of: digests of what all trials share, of its data and of its settings."""
    return {"foundation": foundation(), "data": _data(work / trial.content), "settings": digest_of(trial)}


def keep(
    results: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, Sequence[str]],
    sdxl: Mapping[str, Any],
) -> None:
    """Write all that there is.

    Args:
        results: Figures by a trial's key.
        tables: Of each phase, the keys of its trials.
        sdxl: What each way costs there.
    """
    write(NAME, {"sdxl": sdxl, "tables": tables, "trials": results}, gpu=None)


@cache
def foundation() -> str:
    """Digest of what all trials share: the base, and who judges how many pictures, drawn how."""
    digest = hashlib.sha256()
    weights = sorted(FOLDER.rglob("*.safetensors"))
    assert len(weights) > 3, FOLDER
    for file in weights:
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    digest.update(inspect.getsource(judge).encode())
    digest.update(repr((PROMPTS, SAMPLER_STEPS, LORA_GUIDANCE)).encode())
    return digest.hexdigest()[:16]


@cache
def _data(folder: Path) -> str:
    """Digest of pictures and captions."""
    files = sorted(folder.iterdir())
    assert files, folder
    told = "".join(f"{file.name} {file_hash(file)}\n" for file in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _stands(figures: Mapping[str, Any], work: Path) -> bool:
    trial = Trial(**{field.name: figures[field.name] for field in fields(Trial)})
    if trial.way not in EVERY_WAY:
        return False
    return all(figures[name] == digest for name, digest in stands_on(trial, work).items())
