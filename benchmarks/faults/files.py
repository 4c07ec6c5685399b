"""Crashes, power cuts, errors and damage at every operation on files: half of the parts of ``faults``.

Each part takes an empty folder to work in and the minutes that it may take, which only the long parts in
``runs`` need, and returns its figures. What does not survive raises, so that a figure is always "all of
them".
"""

from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import crash_scenarios as scenarios
from benchmarks.faults.crash_scenarios import Scenario, crash_everywhere, cut_power_everywhere
from benchmarks.faults.damage import corrupt
from benchmarks.faults.disk_errors import ERRORS, listening, survive_all
from benchmarks.faults.operations import SHARES
from lora_utils import stages
from lora_utils.config.schema import ModelConfig
from lora_utils.config.training import LoraConfig
from lora_utils.model import lora
from lora_utils.model.base import PretrainedSdxl

TINY = Path(stages.__file__).parent / "tiny"
DAMAGES = 500
SEED = 0


def crashes(work: Path, minutes: float) -> dict[str, Any]:
    """The process ends before every operation, and in the middle of every one that is about bytes."""
    figures: dict[str, Any] = {"crashes": 0, "old_or_new_whole": 0}
    for name, scenario in _scenarios().items():
        # Raises where neither the old nor the new is whole: the two counts can only be equal.
        operations, outcomes = crash_everywhere(scenario, work / name, SHARES)
        count = sum(outcomes.values())
        figures[name] = {"operations": sum(operations.values()), "crashes": count, "outcomes": dict(outcomes)}
        figures["crashes"] += count
        figures["old_or_new_whole"] += count
    return figures


def power_cuts(work: Path, minutes: float) -> dict[str, Any]:
    """Every state of the model in ``power``, before every operation."""
    figures: dict[str, Any] = {"states": 0, "old_or_new_whole": 0}
    for name, scenario in _scenarios().items():
        if name == "log":
            continue  # it is not synced: its lines are in every checkpoint too
        outcomes = cut_power_everywhere(scenario, work / name)
        figures[name] = dict(outcomes)
        figures["states"] += sum(outcomes.values())
        figures["old_or_new_whole"] += sum(outcomes.values())
    return figures


def errors(work: Path, minutes: float) -> dict[str, Any]:
    """Four errors at every operation of a checkpoint, reads too, once and from then on."""
    with listening() as heard:
        outcomes = survive_all(work, ERRORS, heard)
    return {
        "errors": sum(outcomes.values()),
        "nothing_lost": sum(outcomes.values()),
        "outcomes": dict(outcomes),
    }


def damage(work: Path, minutes: float) -> dict[str, Any]:
    """Damages of the newest checkpoint, of nine kinds in turn."""
    with listening() as heard:
        noticed = corrupt(work, DAMAGES, SEED, lambda: "\n".join(heard()))
    return {"damages": DAMAGES, "found": sum(noticed.values()), "kinds": dict(noticed)}


def _scenarios() -> dict[str, Scenario]:
    unet = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY)), None).load_unet(torch.float32)
    lora.add_lora(unet, LoraConfig(rank=1), seed=0)
    return {
        "checkpoint": scenarios.checkpoints(),
        "checkpoint in place of a damaged one": scenarios.damaged_checkpoints(),
        "cache": scenarios.cache_packs(),
        "log": scenarios.run_log(),
        "export": scenarios.export(unet),
    }
