"""What makes a run this run: which settings a checkpoint must share, and which may change on the way."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from lora_utils.config.schema import RunConfig
from lora_utils.precompute.examples import Entry

FIXED = ("seed", "train_batch_size", "gradient_accumulation_steps", "loraplus_lr_ratio", "use_ema")
SILENT = (
    *(
        "num_train_epochs",
        "max_train_steps",
        "optimizer",
        "use_8bit_adam",
        "gradient_checkpointing",
        "vram_gib",
    ),
    *("lean_step", "channels_last", "torch_compile", "validation_steps", "max_skipped_steps"),
)  # told as steps and as the optimiser's class, or without influence beyond the last bits


def run_identity(config: RunConfig, facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is compared when a run goes on; JSON.

    Args:
        config: Of the run.
        facts: What no setting tells: base (identity of its weights), data (from ``data_digest``), optimizer (class),
            processes, precision; and steps, device, versions.

    Returns:
        ``fixed``, which a checkpoint must share, and ``free``, which may change.
    """
    adapter, train = config.lora.model_dump(mode="json"), config.train.model_dump(mode="json")
    adapter["lora_alpha"] = config.lora.lora_alpha or config.lora.rank
    dropout = adapter.pop("lora_dropout")
    fixed = {name: facts[name] for name in ("base", "data", "precision", "optimizer", "processes")}
    fixed |= {
        "base_precision": config.model.base_precision,
        **adapter,
        **{name: train[name] for name in FIXED},
    }
    free = {name: value for name, value in train.items() if name not in (*FIXED, *SILENT)}
    free |= {"lora_dropout": dropout, "caption_dropout_rate": config.data.caption_dropout_rate}
    free |= {"latent_mode": config.data.latent_mode}
    free |= {name: facts[name] for name in ("steps", "device", "versions")}
    return {"fixed": fixed, "free": free}


def data_digest(entries: Iterable[Entry], unconditional_key: str) -> str:
    """What identifies the examples: contents, crops, captions and encoders, in order; not where they are kept."""
    digest = hashlib.sha256(unconditional_key.encode())
    for entry in entries:
        row = [entry.image_keys, entry.text_keys, entry.repeats, entry.held_out]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:32]


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two of ``fixed`` or ``free``, as text."""
    found = []
    for name in sorted({*saved, *now}):
        before, after = saved.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changes(before, after)
        elif before != after:
            found.append(
                f"{name} is other now" if name in ("base", "data") else f"{name} was {before}, is {after}"
            )
    return found
