"""A second home for what a run cannot lose: checkpoints, the cache and the weights, copied while it trains.

Training works on the local disk; a thread follows it into a folder such as one on Google Drive. Whatever that
folder does, training neither waits for it nor fails with it.
"""

import errno
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_utils.storage.checkpoint import step_of
from lora_utils.storage.mirror_copy import CacheCopy, copy_file, copy_folder, is_copy, read_manifest
from lora_utils.storage.mirror_folder import (
    CHECKPOINTS,
    PRECOMPUTED,
    MirrorError,
    open_mirror,
    patiently,
    prune_copies,
    same_disk,
    set_aside,
    sweep_mirror,
)
from lora_utils.storage.mirror_note import Identity, Owner, TakenOverError, choose_folder, look_at, write_note
from lora_utils.system.files import DamagedError

LOGGER = logging.getLogger(__name__)
RETRY_SECONDS = (2.0, 5.0, 15.0, 30.0, 60.0)
"""Pauses after failures in a row; the last one is repeated."""
TOLD_AFTER = 3
"""Failures in a row, before which most of them pass by themselves."""
GOODBYE_SECONDS = 2.0
"""At the end, for taking the owner's name away from a mirror that has everything."""
CACHE = "the cache"
CHECKPOINT = "checkpoint"


@dataclass(frozen=True, eq=False)
class _Offer:
    """Something to copy. Two offers of one path differ: what comes during a copy is copied again."""

    path: Path


class Mirror:
    """Copies what it is offered into ``mirror_dir``, in a folder named like the run's.

    Where that is another run's, it takes the name with -2, -3 and so on.
    """

    def __init__(
        self,
        mirror_dir: Path,
        output_dir: Path,
        cache_folder: Path,
        identity: Identity,
        name: str | None = None,
        retry_seconds: tuple[float, ...] = RETRY_SECONDS,
    ) -> None:
        """Start the thread.

        Args:
            mirror_dir: The folder that is mirrored into, such as one of a mounted drive.
            output_dir: The run folder.
            cache_folder: The run's cache.
            identity: What makes the run this run, as ``restore`` is given it.
            name: Of the run's folder in the mirror; that of output_dir, when not given.
            retry_seconds: Pauses after failures in a row.

        Raises:
            MirrorError: ``mirror_dir`` is not there or cannot be read; says what to do.
        """
        self._mirror_dir = mirror_dir
        self._output_dir = output_dir.resolve()
        # Remembered, because an unmounted drive leaves an empty folder on the local disk, which looks like a
        # mirror.
        self._is_mount = _is_mount(mirror_dir, self._output_dir)
        self._name_of_run = name or self._output_dir.name
        self.folder = choose_folder(mirror_dir, self._name_of_run, identity)
        self.safe_step: int | None = None
        """Newest step whose copy was read back from the mirror."""
        self._retry_seconds = retry_seconds
        self._identity = identity
        self._owner = Owner()
        self._is_owner = False
        self._begins: tuple[str | None, int] | None = None

        # By name of what is copied: a newer checkpoint takes the place of one that is still waiting.
        self._cache = CacheCopy(cache_folder, self.folder / PRECOMPUTED)
        self._offered: dict[str, _Offer] = {}
        self._pending: dict[str, _Offer] = {}
        self._dropped: dict[str, str] = {}
        self._reason = "there was not enough time"
        self._told = False
        self._changed = threading.Condition()
        self._closing = False
        self._in_a_hurry = False
        self._over = False
        self._is_well_over = False
        # A daemon: a mount that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def begin(self, start: str | None, step: int) -> None:
        """Say where the run begins, before it offers anything; what the mirror has beyond is set aside.

        Args:
            start: What tells one start of a run at step 0 from another; a run that goes on has kept it.
            step: Of the checkpoint that it goes on from.
        """
        self._begins = (start, step)

    def offer(self, folder: Path) -> None:
        """Have a committed checkpoint copied, and the cache's new packs before it; returns at once."""
        self.offer_cache()
        self._put(CHECKPOINT, folder)

    def offer_cache(self) -> None:
        """Have the cache's new packs copied; returns at once."""
        self._put(CACHE, self._output_dir)

    def offer_file(self, path: Path) -> None:
        """Have a finished file of the run folder copied; returns at once."""
        self._put(path.name, path)

    def close(self, seconds: float) -> str | None:
        """Wait so long for what is pending, and read the newest copies once more.

        Returns:
            None when all that was offered is safe; else what is not, why, and what to do.
        """
        with self._changed:
            # Offered anew, everything is read back once more: a mount may have lost what it had shown before.
            if not self._over:
                for key, offer in self._offered.items():
                    if offer.path.exists():
                        self._pending[key] = _Offer(offer.path)
            self._closing = True
            self._in_a_hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over or not self._pending, seconds)
            self._over = True
            self._changed.notify_all()
            missing = self._pending.keys() | self._dropped.keys()
            self._is_well_over = not missing
            safe = "no checkpoint" if self.safe_step is None else f"step {self.safe_step}"
            named = " and ".join(self._name(key) for key in sorted(missing))
        if not missing:
            self._thread.join(GOODBYE_SECONDS)
            return None
        return (
            f"{self.folder} may lack {named} ({self._reason}; verified there: {safe}); copy "
            f"{self._output_dir} yourself before this machine ends"
        )

    def _put(self, key: str, path: Path) -> None:
        with self._changed:
            self._offered[key] = self._pending[key] = _Offer(path)
            self._changed.notify_all()

    def _work(self) -> None:
        failures = 0
        try:
            while self._wait(failures):
                problem = self._turn()
                failures = failures + 1 if problem else 0
                self._tell(problem, failures)
            if self._is_well_over and self._is_owner:
                self._owner.give_up(self.folder)
        except TakenOverError as error:
            self._reason = str(error)
            LOGGER.warning("%s; this process mirrors nothing more into %s", error, self.folder)
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _wait(self, failures: int) -> bool:
        """Until there is work and it is time for it; False when all is over."""
        with self._changed:
            if failures:
                # At the end there is little time: no long pauses then.
                number = 0 if self._closing else min(failures, len(self._retry_seconds)) - 1
                self._changed.wait_for(lambda: self._in_a_hurry or self._over, self._retry_seconds[number])
            self._in_a_hurry = False
            self._changed.wait_for(lambda: self._over or self._pending)
            return not self._over

    def _turn(self) -> str | None:
        """Take up everything that is pending once; returns why something failed."""
        with self._changed:
            pending = dict(self._pending)
        problem = None
        # The cache first, the checkpoint next: a checkpoint without its records would cost an encoding to go
        # on from.
        for key in sorted(pending, key=lambda key: (key != CACHE, key != CHECKPOINT)):
            dropped = None
            is_done = False
            try:
                self._require_mounted()
                is_done = self._copy(key, pending[key].path)
            except DamagedError as error:
                dropped = str(error)
                is_done = True
            except (OSError, MemoryError) as error:
                problem = f"{getattr(error, 'strerror', None) or type(error).__name__}, at {self._name(key)}"
            if is_done:
                self._settle(key, pending[key], dropped)
        return problem

    def _settle(self, key: str, offer: _Offer, dropped: str | None) -> None:
        with self._changed:
            # A newer offer of the same name came while this one was copied: that one still waits.
            if self._pending.get(key) is offer:
                del self._pending[key]
            self._dropped.pop(key, None)
            if dropped:
                self._dropped[key] = self._reason = dropped
            self._changed.notify_all()
        if dropped and offer.path.exists():  # else training has pruned it, and a newer one comes
            LOGGER.warning("%s is not mirrored: %s", offer.path, dropped)

    def _copy(self, key: str, path: Path) -> bool:
        """Whether it is done with."""
        # Without parents: an unmounted drive must not be built on the local disk.
        self.folder.mkdir(exist_ok=True)
        self._enter()
        if key == CACHE:
            return self._cache.advance()
        self._make_way()
        if key == CHECKPOINT:
            self._copy_checkpoint(path)
        else:
            copy_file(path, self.folder / path.name)
            sweep_mirror(self.folder)
        return True

    def _enter(self) -> None:
        """Make sure, before each copy, that the folder is this run's and no other process writes there."""
        if self._is_owner:
            self._owner.require(self.folder)
            return
        standing = look_at(self.folder)
        if differences := standing.differences(self._identity):  # it came between choosing and now
            raise TakenOverError(f"another run came first ({'; '.join(differences)})")
        # Before anything else is written: else nobody could tell whose it is.
        if not standing.has_note:
            write_note(self.folder, self._identity, standing.start, self._name_of_run)
        self._owner.take(self.folder)
        self._is_owner = True

    def _make_way(self) -> None:
        """Set aside what this run did not write, and what it goes back behind, before it is copied over."""
        if self._begins is None:
            return
        start, step = self._begins
        standing = look_at(self.folder)
        is_continued = standing.start == start
        if aside := set_aside(self.folder, step + 1 if is_continued else 0):
            which = f"later steps than {step}, from which it goes on" if is_continued else "an earlier start"
            LOGGER.warning("the mirror held %s of this run; that is in %s now", which, aside)
        # Last: cut short before, it is found and set aside again.
        if not (is_continued and standing.has_note):
            write_note(self.folder, self._identity, start, self._name_of_run)
        self._begins = None

    def _copy_checkpoint(self, source: Path) -> None:
        checkpoints = self.folder / CHECKPOINTS
        step = step_of(source.name) or 0
        checkpoints.mkdir(exist_ok=True)
        target = checkpoints / source.name
        # Read back even when it was copied before: that is what "safe in the mirror" says.
        if not is_copy(target, read_manifest(source)):
            if self.safe_step == step:
                self.safe_step = None  # it was there, and was lost
            copy_folder(source, target)
        self._claim(step)
        with suppress(OSError):  # the next checkpoint prunes again
            prune_copies(checkpoints, step)
        sweep_mirror(checkpoints)

    def _claim(self, step: int) -> None:
        self.safe_step = step

    def _require_mounted(self) -> None:
        if self._is_mount and same_disk(self._mirror_dir, self._output_dir):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    def _name(self, key: str) -> str:
        return self._offered[key].path.name if key == CHECKPOINT else key

    def _tell(self, problem: str | None, failures: int) -> None:
        if problem:
            self._reason = problem
            # Not at the first failure: Drive's mount hiccups, and a warning each time would be noise.
            if failures == TOLD_AFTER:
                LOGGER.warning(
                    "copying to %s fails (%s); training goes on, and it is tried again", self.folder, problem
                )
                self._told = True
        elif self._told:
            LOGGER.warning("copying to %s works again", self.folder)
            self._told = False


def _is_mount(mirror_dir: Path, output_dir: Path) -> bool:
    """Whether the mirror, which is made, outlives the disk of output_dir; told where it does not."""
    try:
        patiently(lambda: open_mirror(mirror_dir), mirror_dir)
        is_mount = not same_disk(mirror_dir, output_dir)
    except OSError as error:
        raise MirrorError(
            f"mirror_dir cannot be used ({error}); mount the drive again, or unset it"
        ) from error
    if not is_mount:
        LOGGER.warning("mirror_dir %s is on the disk of output_dir, and would be lost with it", mirror_dir)
    return is_mount
