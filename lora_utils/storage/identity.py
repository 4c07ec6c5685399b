"""What makes a run this run: which settings a checkpoint must share, and which may change on the way."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from lora_utils.config.data import DataConfig
from lora_utils.config.training import LoraConfig, TrainConfig
from lora_utils.precompute.examples import Entry

SHOWN = 3
"""Examples that a sentence names."""
# Of the section train, what decides which numbers a step sees, and what the optimiser's states mean.
FIXED = ("seed", "train_batch_size", "gradient_accumulation_steps", "loraplus_lr_ratio", "use_ema")
# Of the same section, what is told otherwise (as steps, as the optimiser's class), or without influence
# beyond the last bits.
SILENT = (
    "num_train_epochs", "max_train_steps", "optimizer", "use_8bit_adam", "gradient_checkpointing", "vram_gib",
    "lean_step", "channels_last", "deterministic", "torch_compile", "validation_steps", "max_skipped_steps",
)  # fmt: skip


def run_identity(
    lora: LoraConfig, train: TrainConfig, data: DataConfig, facts: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What is compared when a run goes on; what JSON can hold.

    Args:
        lora: The adapter.
        train: The loop.
        data: How often captions are dropped, and how latents are drawn; all else is in the data's digest.
        facts: base (identity of its weights), base_precision, data (from ``data_digest``), optimizer (class),
            processes, precision; and steps, device, versions.

    Returns:
        ``fixed``, which a checkpoint must share, and ``free``, which may change.
    """
    adapter = lora.model_dump(mode="json")
    adapter["lora_alpha"] = lora.lora_alpha or lora.rank
    dropout = adapter.pop("lora_dropout")

    loop = train.model_dump(mode="json")

    decisive = ("base", "data", "precision", "optimizer", "processes", "base_precision")
    fixed = {name: facts[name] for name in decisive}
    fixed |= adapter
    fixed |= {name: loop[name] for name in FIXED}

    free = {name: value for name, value in loop.items() if name not in (*FIXED, *SILENT)}
    free["lora_dropout"] = dropout
    free["caption_dropout_rate"] = data.caption_dropout_rate
    free["latent_mode"] = data.latent_mode
    free |= {name: facts[name] for name in ("steps", "device", "versions")}
    return {"fixed": fixed, "free": free}


def data_digest(entries: Iterable[Entry], unconditional_key: str) -> str:
    """What identifies the examples: contents, crops, captions and encoders, in order; not their place."""
    digest = hashlib.sha256(unconditional_key.encode())
    for entry in entries:
        row = [entry.image_keys, entry.text_keys, entry.repeats, entry.held_out]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:32]


def example_digests(entries: Iterable[Entry]) -> dict[str, list[str]]:
    """Source of each example to what tells its picture and its captions from other ones."""
    return {
        entry.source: [_short([entry.image_keys, entry.repeats]), _short(entry.text_keys)]
        for entry in entries
    }


def data_changes(before: Mapping[str, list[str]], after: Mapping[str, list[str]]) -> str:
    """Which examples differ, in a few words; both from ``example_digests``."""
    both = before.keys() & after.keys()
    groups = {
        "new": sorted(after.keys() - before.keys()),
        "gone": sorted(before.keys() - after.keys()),
        "with another caption": sorted(source for source in both if before[source][1] != after[source][1]),
        "other pictures": sorted(source for source in both if before[source][0] != after[source][0]),
    }
    # Other encoders, or another size of all pictures: the names would tell nothing.
    for name in ("with another caption", "other pictures"):
        if len(groups[name]) == len(both) > 1:
            groups[name] = []
    told = [f"{len(sources)} {name} ({_listed(sources)})" for name, sources in groups.items() if sources]
    return "data is other now: " + (", ".join(told) or "all of it is framed, held out or encoded otherwise")


def _listed(sources: list[str]) -> str:
    more = f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
    return ", ".join(sources[:SHOWN]) + more


def _short(keys: object) -> str:
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:12]


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two of ``fixed`` or ``free``, as text; mappings in them entry by entry."""
    differences = []
    for name in sorted({*saved, *now}):
        before = saved.get(name)
        after = now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += changes(before, after)
        elif before == after:
            continue
        elif name in ("base", "data"):  # hashes, which tell a reader nothing
            differences.append(f"{name} is other now")
        else:
            differences.append(f"{name} was {before}, is {after}")
    return differences
