"""Short checks of everything that only a card can answer, the most telling first; without heavy imports.

``gpu --smoke`` runs them. Checks of one process follow each other in it; a check that ends it costs the rest
a new one, and no more. ``benchmarks.report.smoke`` compares what they did, by their names.
"""

from dataclasses import dataclass, field
from typing import Any

FIRST = "train fp16"
AGAIN = ", in another process"
STEP = "sdxl-size step and held-out batch, "
DETERMINISTIC = "deterministic, "
RUN = "a run of 50 steps"


@dataclass(frozen=True)
class Check:
    """Something that has to hold."""

    name: str
    function: str
    """Of ``jobs.CHECKS``."""
    seconds: float
    """What it is expected to take where no result file says it."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of a training by name, and what else the function asks for."""
    process: str = "first"
    """Label of the process that it runs in."""

    @property
    def is_deterministic(self) -> bool:
        """Whether its process has torch's deterministic algorithms."""
        return bool(self.changes.get("deterministic"))


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"base_precision": "nf4"},
    "int8": {"base_precision": "int8"},
    "peft's way": {"lean_step": False},
    "full": {"target_modules": ["full"]},
    "all recomputed": {"gradient_checkpointing": "full"},
    "adamw8bit": {"optimizer": "adamw8bit", "rank": 64},
    "fp32": {"mixed_precision": "fp32"},
    "held out, ema": {"validation_split": 0.2, "use_ema": True, "validation_steps": 2},
    "attn+ff, dropout, snr": {"target_modules": ["attn+ff"], "lora_dropout": 0.1, "snr_gamma": 5},
    "dora": {"use_dora": True},
    "nf4, peft's way": {"base_precision": "nf4", "lean_step": False},
    "int8, peft's way": {"base_precision": "int8", "lean_step": False},
    "channels_last, peft's way": {"channels_last": True, "lean_step": False},
    "bf16": {"mixed_precision": "bf16"},
}
"""Of a training, beside those of ``trainings.SETTINGS``."""
REPEATED = ("int8", "fp32", "nf4")
"""Settings that another process must repeat, beside the first training."""


def _again(name: str, changes: dict[str, Any]) -> Check:
    return Check(name + AGAIN, "training", 4, changes, "another")


def _deterministic(suffix: str) -> list[Check]:
    changes: dict[str, dict[str, Any]] = {"fp16": {}} | {name: OTHER_SETTINGS[name] for name in REPEATED}
    return [
        Check(
            DETERMINISTIC + name + suffix,
            "training",
            5,
            settings | {"deterministic": True},
            "deterministic" + suffix,
        )
        for name, settings in changes.items()
    ]


CHECKS: list[Check] = [
    Check("facts", "facts", 1),
    Check("nodes", "nodes", 3),
    Check(FIRST, "training", 10),
    Check("train fp16 again: same bytes?", "training", 4),
    Check("resumed: same bytes?", "resumed", 6),
    Check(STEP + "fp16", "step", 10, {"base": "fp16"}),
    Check(STEP + "nf4", "step", 15, {"base": "nf4"}),
    Check("out of memory", "full card", 6),
    Check("left behind by a run", "left behind", 4),
    *(Check(name, "training", 5, OTHER_SETTINGS[name]) for name in REPEATED),
    _again(FIRST, {}),
    *(_again(name, OTHER_SETTINGS[name]) for name in REPEATED),
    *_deterministic(""),
    *_deterministic(AGAIN),
    Check(RUN, "run", 120, process="run"),
    *(
        Check(name, "training", 5, changes, "settings")
        for name, changes in OTHER_SETTINGS.items()
        if name not in REPEATED
    ),
    Check("compare", "compare", 5, process="settings"),
]
