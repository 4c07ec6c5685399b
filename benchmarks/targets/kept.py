"""Trials in the result file, as long as what they were carried out with is what is here."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.record import read, write
from benchmarks.targets.plan import CONTENTS
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
    if not kept or kept["figures"].get("foundation") != foundation(work):
        return {}
    trials = kept["figures"]["trials"]
    return {key: figures for key, figures in trials.items() if _stands(figures)}


def keep(
    work: Path,
    results: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, Sequence[str]],
    sdxl: Mapping[str, Any],
) -> None:
    """Write all that there is.

    Args:
        work: With the data sets, in folders named by their content.
        results: Figures by a trial's key.
        tables: Of each phase, the keys of its trials.
        sdxl: What each way costs there.
    """
    write(NAME, {"foundation": foundation(work), "sdxl": sdxl, "tables": tables, "trials": results}, gpu=None)


@cache
def foundation(work: Path) -> str:
    """Digest of what all trials share: the base, the pictures and captions, and who judges what how often.

    Settings are not in it: a trial keeps the digest of its own.
    """
    digest = hashlib.sha256()
    weights = sorted(FOLDER.rglob("*.safetensors"))
    data = [file for content in CONTENTS for file in sorted((work / content).iterdir())]
    assert len(weights) > 3, FOLDER
    assert data, work
    for file in (*weights, *data):
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    digest.update(inspect.getsource(judge).encode())
    digest.update(repr((PROMPTS, SAMPLER_STEPS, LORA_GUIDANCE)).encode())
    return digest.hexdigest()[:16]


def _stands(figures: Mapping[str, Any]) -> bool:
    trial = Trial(**{field.name: figures[field.name] for field in fields(Trial)})
    return trial.way in EVERY_WAY and figures["settings"] == digest_of(trial)
