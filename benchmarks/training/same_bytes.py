"""Whether two commits make the same bytes: ``python -m benchmarks same_bytes --commit HASH``; CPU, tiny SDXL.

Every case is trained by the other commit and by this one, each through its own command line, and compared:
the LoRA, metrics.jsonl without times and memory, the tensors of the newest checkpoint, and every record of
the cache. Then this commit goes on from a checkpoint and a cache that the other one made.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.record import ROOT, save
from lora_utils.tiny.demo_data import draw_demo_data

PICTURES = 12
COMMON = {
    "pretrained_model_name_or_path": str(ROOT / "lora_utils" / "tiny"),
    "resolution": 64,
    "max_train_steps": 4,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "validation_split": 0.2,
    "validation_steps": 2,
    "resume_from_checkpoint": "latest",
    "dataloader_num_workers": 0,
    "target_modules": "attn",  # named, as the next one: what is the default has changed
    "caption_dropout_rate": 0.0,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "EMA, cosine with warm-up": {"use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "dropout of captions and LoRA": {"lora_dropout": 0.1, "caption_dropout_rate": 0.3},
    "accumulation, LoRA+": {"gradient_accumulation_steps": 3, "loraplus_lr_ratio": 4},
    "buckets, random crops and flips": {
        "enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 96, "bucket_reso_steps": 16,
        "random_crop": True, "random_flip": True,
    },
    "shuffled tags, trigger word": {
        "shuffle_caption": True, "trigger_word": "inkstyle", "max_token_length": 150,
    },
    "8-bit Adam, all layers": {"optimizer": "adamw8bit", "target_modules": "full"},
    "Prodigy": {"optimizer": "prodigy", "learning_rate": 1},
    "schedule-free, min-SNR, noise offset": {
        "optimizer": "schedulefree", "snr_gamma": 5, "noise_offset": 0.05,
    },
    "nf4 base": {"base_precision": "nf4"},
    "int8 base, huber": {"base_precision": "int8", "loss_type": "huber", "input_perturbation": 0.1},
    "bf16": {"mixed_precision": "bf16"},
    "peft's own step, everything recomputed": {"lean_step": "false", "gradient_checkpointing": "full"},
    "two processes": {"PROCESSES": 2},
    "resumed after every step": {"CALLS": 4, "max_train_minutes": 1e-6, "use_ema": True, "lora_dropout": 0.1},
}  # fmt: skip
TAKEN_OVER = "a checkpoint and a cache of the other commit"


def main() -> None:
    """Train every case on both sides, print and keep what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True, help="to compare with; it is checked out beside the work")
    parser.add_argument("--only", metavar="CASE", help="one case")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        other = work / "other"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(other), options.commit], cwd=ROOT, check=True
        )
        try:
            differing = compare_all(other, work, [options.only] if options.only else [*CASES, TAKEN_OVER])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)

    save("same_bytes", {"commit": options.commit, "cases": len(differing), "differing": differing})
    if any(differing.values()):
        raise SystemExit(1)


def compare_all(other: Path, work: Path, cases: list[str]) -> dict[str, list[str]]:
    """Case to the names of what differs."""
    pictures = work / "pictures"
    draw_demo_data(work / "all")
    pictures.mkdir()
    for file in sorted((work / "all").iterdir())[: 2 * PICTURES]:
        shutil.copy(file, pictures)

    differing = {}
    for number, case in enumerate(cases):
        if case == TAKEN_OVER:
            expected, found = _taken_over(other, work, pictures)
        else:
            runs = work / f"{number}-other", work / f"{number}-this"
            for root, run in zip((other, ROOT), runs, strict=True):
                train(root, run, pictures, CASES[case])
            expected, found = map(contents, runs)
        differing[case] = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        print(f"{case}: {', '.join(differing[case]) or 'the same'} ({len(expected)} compared)", flush=True)
    return differing


def train(root: Path, run: Path, pictures: Path, settings: dict[str, Any]) -> str:
    """Train by the code in ``root``, as a user would; returns what it printed."""
    settings = COMMON | {"train_data_dir": pictures, "output_dir": run} | settings
    calls, processes = settings.pop("CALLS", 1), settings.pop("PROCESSES", 1)
    launcher = [sys.executable, "-m", "lora_utils"]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            str(processes),
        ]
        launcher += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "-m",
            "lora_utils",
        ]
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    printed = ""
    for _ in range(calls):
        command = [*launcher, "train", *flags]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed in {root}:\n{done.stderr[-3000:]}")
        printed += done.stdout + done.stderr
    return printed


def contents(run: Path) -> dict[str, str]:
    """What must not differ between two runs: name to hash."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [
        {k: v for k, v in json.loads(line).items() if not re.search("seconds|memory", k)} for line in lines
    ]
    found = {
        "weights": _hash((run / "pytorch_lora_weights.safetensors").read_bytes()),
        "log": _hash(json.dumps(records, sort_keys=True).encode()),
        "index of the cache": _hash((run / "precomputed" / "index.jsonl").read_bytes()),
    }
    newest = max((run / "checkpoints").glob("step-*"))
    for file in newest.glob("*.safetensors"):
        found[f"checkpoint's {file.name}"] = _hash(file.read_bytes())
    for file in (run / "precomputed").glob("*.safetensors"):
        with safe_open(file, framework="np") as pack:
            keys, hashes = pack.get_tensor("keys"), pack.get_tensor("hashes")
            notes = json.loads(pack.metadata()["notes"])
        for key, digest in zip(keys, hashes, strict=True):
            found[f"record {bytes(key).hex()}"] = f"{bytes(digest).hex()} {notes.get(bytes(key).hex())}"
    return found


def _taken_over(other: Path, work: Path, pictures: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Go on by this commit where the other one was stopped; against the other one's whole run."""
    settings = {"use_ema": True, "max_train_minutes": 1e-6, "optimizer": "adamw8bit"}
    whole, begun = work / "whole", work / "begun"
    train(other, whole, pictures, settings | {"CALLS": 4})
    train(other, begun, pictures, settings | {"CALLS": 2})

    printed = train(ROOT, begun, pictures, settings | {"CALLS": 2})
    if "going on from" not in printed or "step 2 of 4" not in printed:
        raise SystemExit(f"it did not go on from the other commit's checkpoint:\n{printed}")
    return contents(whole), contents(begun)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
