"""A run, its cache and a fake drive, without any pauses."""

import time
from contextlib import contextmanager, suppress
from unittest import mock

from benchmarks.faults.fake_drive import FakeDrive, PowerCut
from lora_utils.storage import mirror_copy, mirror_restore
from lora_utils.storage.checkpoint import step_of
from lora_utils.storage.mirror import Mirror
from lora_utils.storage.mirror_folder import steps_in
from lora_utils.system.files import commit_folder

RETRY_SECONDS = (
    0.0,
    0.01,
)  # the last pause repeats while the drive is gone, and must leave the processor alone
PATIENCE_SECONDS = 20


@contextmanager
def quick():
    """No pauses: the fake drive counts operations, not seconds."""
    with (
        # The real 2 GiB of reserve would keep the cache out of the mirror on a machine with a full disk.
        mock.patch.multiple(mirror_copy, LATE_SECONDS=(0.0, 0.0), RESERVED_BYTES=0),
        # More tries than in reality: files become visible one by one, each after up to MOST_ASKED looks.
        mock.patch.multiple(mirror_restore, LATE_SECONDS=(0.0,) * 8, RETRY_SECONDS=(0.0,) * 5),
    ):
        yield


class MortalMirror(Mirror):
    """Its thread ends without a word when the machine is gone."""

    def _work(self):
        with suppress(PowerCut):
            super()._work()


class Place:
    """A run, its cache and a drive."""

    def __init__(self, folder):
        self.drive = FakeDrive(folder / "drive", 0)
        self.drive.root.mkdir(parents=True)
        self.mirror_dir = folder / "drive" / "lora"
        self.output = folder / "run"
        self.cache = folder / "cache"
        self.copies = self.mirror_dir / "run" / "checkpoints"

    def mirror(self):
        return MortalMirror(self.mirror_dir, self.output, self.cache, RETRY_SECONDS)

    def commit(self, step):
        folder = self.output / "checkpoints" / f"step-{step:09d}"
        commit_folder(folder, files_of(step))
        return folder

    def steps(self):
        return [step_of(folder.name) for folder in steps_in(self.copies)]


def files_of(step):
    return {"adapter.safetensors": bytes([step]) * 1000, "state.json": f'{{"step": {step}}}'.encode()}


def wait_for(holds):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)
