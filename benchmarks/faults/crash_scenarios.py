"""What a run writes, each as work that can be interrupted anywhere, and what must hold afterwards.

Five scenarios: ``checkpoints``, ``damaged_checkpoints``, ``cache_packs``, ``run_log`` and ``export``. After a
crash or a power cut at any moment the old or the new is there, whole, and the next run goes on and cleans up.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import yaml

from benchmarks.faults.operations import CRASHED, count_actions, crash, moments, operations
from benchmarks.faults.power import DATA, NAMES, Disk
from benchmarks.faults.small_checkpoints import (
    assert_next_save_is_clean,
    metrics_at,
    newest_step,
    save,
    save_two,
)
from lora_utils.model import lora
from lora_utils.precompute.cache import STALE_SECONDS, Cache, record_key
from lora_utils.storage.log import RunLog
from lora_utils.system.files import PARTIAL, write_atomically

PACKS = 4
"""So many small ones are joined: the cache's ``FEW_PACKS``."""


@dataclass(frozen=True)
class Scenario:
    """Work in a folder."""

    set_up: Callable[[Path], object]
    """Fills an empty folder with what is there before."""
    work: Callable[[Path], object]
    """What is interrupted."""
    check: Callable[[Path], str]
    """Says whether the folder is as before the work or after it; asserts that it is either, bit by bit."""
    go_on: Callable[[Path], object]
    """What the next run does; asserts that it ends well and leaves no litter."""


def crash_everywhere(
    scenario: Scenario, folder: Path, shares: tuple[float, ...]
) -> tuple[Counter[str], Counter[str]]:
    """Crash before every operation and in the middle of it.

    Args:
        scenario: What is crashed.
        folder: An empty one to work in.
        shares: What is left of torn bytes, from 0 to 1, each in turn.

    Returns:
        How many operations there are by action, and how many crashes by what they left.
    """
    root = folder / "crashed"
    outcomes = Counter()

    # The work does the same operations every time: a number from this list names a moment of every run.
    _renew(scenario, root)
    done = operations(root, lambda: scenario.work(root))
    for number, tear in moments(done, shares):
        _renew(scenario, root)
        assert crash(root, lambda: scenario.work(root), number, tear) == CRASHED
        outcomes[scenario.check(root) + ("" if tear is None else ", torn")] += 1
        scenario.go_on(root)
    return count_actions(done), outcomes


def cut_power_everywhere(scenario: Scenario, folder: Path) -> Counter[str]:
    """Every state that a power cut before any operation, or after the last, can leave.

    Returns:
        How many states by what they held.
    """
    root = folder / "recorded"
    left = folder / "left"
    outcomes = Counter()

    # Done once and replayed: no cut needs the work again.
    _renew(scenario, root)
    disk = Disk(root)
    done = operations(root, lambda: scenario.work(root))
    for number, operation in enumerate([None, *done]):
        if operation is not None:
            disk.apply([operation])
        for data, names in product(DATA, NAMES):
            shutil.rmtree(left, ignore_errors=True)
            disk.cut_power(left, data, names)
            outcome = scenario.check(left)
            assert number < len(done) or outcome == "after", "what was written is not on the disk yet"
            outcomes[outcome] += 1
            scenario.go_on(left)
    return outcomes


def _renew(scenario: Scenario, root: Path) -> None:
    # From nothing: what one crash leaves must not help or hinder the next.
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    scenario.set_up(root)


def checkpoints() -> Scenario:
    """The third of three checkpoints, of which two are kept; whatever has a checkpoint's name is whole."""

    def check(root: Path) -> str:
        newest = newest_step(root)
        assert not list(root.glob(".bad-*"))  # reading sets aside what has its name and is not whole
        return {2: "before", 3: "after"}[newest]

    return Scenario(
        save_two,
        lambda root: save(root, 3),
        check,
        lambda root: assert_next_save_is_clean(root, 4),
    )


def damaged_checkpoints() -> Scenario:
    """A checkpoint whose place is taken by a damaged one, as after a fall-back."""

    def set_up(root: Path) -> None:
        save_two(root)
        save(root, 3)
        (root / "step-000000003" / "adapter.safetensors").write_bytes(b"")  # the save must replace, not add

    checks = {2: "before", 3: "after"}
    return Scenario(
        set_up,
        lambda root: save(root, 3),
        lambda root: checks[newest_step(root)],
        lambda root: assert_next_save_is_clean(root, 4),
    )


def cache_packs() -> Scenario:
    """Two records more, written and joined with the packs of the first four."""

    def fill(root: Path, numbers: range) -> None:
        cache = Cache(root)
        for number in numbers:
            if _key(number) not in cache:
                cache.add("images", _key(number), _record(number), [])
                cache.commit()
        cache.compact()

    def set_up(root: Path) -> None:
        # Committed one by one, so that each has a pack of its own.
        cache = Cache(root)
        for number in range(PACKS):
            cache.add("images", _key(number), _record(number), [])
            cache.commit()

    def check(root: Path) -> str:
        cache = Cache(root)
        assert not cache.findings, cache.findings
        # Joining deletes packs: at no moment may the only copy of a record be among them.
        held = [number for number in range(PACKS + 2) if _key(number) in cache]
        assert held[:PACKS] == list(range(PACKS)), f"records are lost: {held}"
        for number in held:
            assert torch.equal(cache.read(_key(number))["moments"], _record(number)["moments"])
        return "after" if len(held) == PACKS + 2 else "before"

    def go_on(root: Path) -> None:
        # Made old, else they might be another run's that is still writing, and are left alone.
        for stray in root.glob(f"{PARTIAL}*"):
            os.utime(stray, (0, os.stat(stray).st_mtime - 2 * STALE_SECONDS))

        # What is left must bear another joining of packs, which also sweeps.
        fill(root, range(PACKS + 2))
        fill(root, range(PACKS + 2, PACKS + 2 + PACKS))
        assert check(root) == "after"
        assert not list(root.glob(".*")), list(root.glob(".*"))

    return Scenario(set_up, lambda root: fill(root, range(PACKS, PACKS + 2)), check, go_on)


def run_log() -> Scenario:
    """The records of a run that goes on from step 2."""

    def work(root: Path) -> None:
        # The log has four lines, the checkpoint two: it is cut back, and the third is written again.
        with RunLog(root, "seed: 1\n", metrics_at(2)) as log:
            log.summarise(steps=2)
            log.add({"step": 3, "loss": 0.5})

    def check(root: Path) -> str:
        assert yaml.safe_load((root / "config.yaml").read_text())["seed"] in (0, 1)
        assert json.loads((root / "versions.json").read_text())["python"]
        status = json.loads((root / "summary.json").read_text())["status"]
        lines = (root / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        assert lines
        for line in lines:
            # Lines are appended: of the last one a crash may leave a part, which the next run overwrites.
            assert not line.endswith(b"\n") or json.loads(line)
        return "before" if status == "failed" else "after"

    def set_up(root: Path) -> None:
        for name, text in {"config.yaml": "seed: 0\n", "versions.json": '{"python": "3"}'}.items():
            write_atomically(root / name, text.encode())
        write_atomically(root / "summary.json", b'{"status": "failed"}')
        write_atomically(root / "metrics.jsonl", metrics_at(4))

    def go_on(root: Path) -> None:
        work(root)
        assert (root / "metrics.jsonl").read_bytes().count(b"\n") == 3
        assert json.loads((root / "summary.json").read_text())["status"] == "done"

    return Scenario(set_up, work, check, go_on)


def export(unet: torch.nn.Module) -> Scenario:
    """The adapter over one that is there."""
    old = b"an older adapter"

    def work(root: Path) -> None:
        lora.save_lora(unet, root)

    def check(root: Path) -> str:
        content = (root / lora.WEIGHTS_NAME).read_bytes()
        new = (root.parent / "reference" / lora.WEIGHTS_NAME).read_bytes()
        assert content in (old, new)
        return "before" if content == old else "after"

    def set_up(root: Path) -> None:
        # What a save that nobody disturbs writes; beside the folder, which is made anew for every crash.
        if not (root.parent / "reference").exists():
            lora.save_lora(unet, root.parent / "reference")
        write_atomically(root / lora.WEIGHTS_NAME, old)

    def go_on(root: Path) -> None:
        work(root)
        assert check(root) == "after"

    return Scenario(set_up, work, check, go_on)


def _key(number: int) -> str:
    return record_key(number=number)


def _record(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"moments": torch.randn(8, 4, 4, generator=generator), "time_ids": torch.full((6,), float(number))}
