"""A run, its cache and a fake drive, without any pauses."""

import json
import time
from contextlib import contextmanager, suppress
from unittest import mock

from benchmarks.faults.fake_drive import FakeDrive, PowerCut
from lora_utils.storage import mirror_copy, mirror_folder
from lora_utils.storage.checkpoint import step_of
from lora_utils.storage.mirror import Mirror
from lora_utils.storage.mirror_folder import steps_in
from lora_utils.storage.mirror_restore import restore
from lora_utils.system.files import commit_folder

RETRY_SECONDS = (
    0.0,
    0.01,
)  # the last pause repeats while the drive is gone, and must leave the processor alone
PATIENCE_SECONDS = 20
IDENTITY = {
    "fixed": {"base": "b" * 32, "data": "d" * 32, "rank": 16, "optimizer": "adamw", "seed": 0},
    "free": {"learning_rate": 1e-4, "steps": 10**6},
}
"""Of the run that is mirrored, unless another is given."""


@contextmanager
def quick():
    """No pauses: the fake drive counts operations, not seconds."""
    with (
        # The real 2 GiB of reserve would keep the cache out of the mirror on a machine with a full disk.
        mock.patch.multiple(mirror_copy, LATE_SECONDS=(0.0, 0.0), RESERVED_BYTES=0),
        # More tries than in reality: files become visible one by one, each after up to MOST_ASKED looks.
        mock.patch.multiple(mirror_folder, LATE_SECONDS=(0.0,) * 8, RETRY_SECONDS=(0.0,) * 5),
    ):
        yield


class MortalMirror(Mirror):
    """Its thread ends without a word when the machine is gone."""

    def _work(self):
        with suppress(PowerCut):
            super()._work()


class Place:
    """A run, its cache and a drive."""

    def __init__(self, folder, identity=IDENTITY):
        self.identity = identity
        self.drive = FakeDrive(folder / "drive", 0)
        self.drive.root.mkdir(parents=True)
        self.mirror_dir = folder / "drive" / "lora"
        self.output = folder / "run"
        self.cache = folder / "cache"
        self.copies = self.mirror_dir / "run" / "checkpoints"

    def mirror(self):
        return MortalMirror(
            self.mirror_dir, self.output, self.cache, self.identity, retry_seconds=RETRY_SECONDS
        )

    def restore(self):
        return restore(self.mirror_dir, self.output, self.cache, self.identity)

    def commit(self, step):
        folder = self.output / "checkpoints" / f"step-{step:09d}"
        commit_folder(folder, files_of(step))
        return folder

    def steps(self):
        return [step_of(folder.name) for folder in steps_in(self.copies)]


def files_of(step, identity=IDENTITY, start=None):
    """A checkpoint as ``CheckpointStore`` writes it, as far as the mirror looks at it."""
    state = {"step": step, "about": {"fingerprint": identity, "start": start}}
    return {"adapter.safetensors": bytes([step % 256]) * 1000, "state.json": json.dumps(state).encode()}


def wait_for(holds):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)
