"""A run that is mirrored to the fake drive, loses its machine again and again, and is restored on another."""

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

from benchmarks.faults.fake_drive import BAD_DAY, CALM, FakeDrive
from benchmarks.faults.mirrored_run import IDENTITY, PATIENCE_SECONDS, RETRY_SECONDS, MortalMirror, quick
from benchmarks.faults.small_cache import MOST, all_sound, encode, whole
from lora_utils.storage.mirror import Mirror
from lora_utils.storage.mirror_folder import MirrorError, packs_in, steps_in
from lora_utils.storage.mirror_restore import restore
from lora_utils.system.files import DamagedError, commit_folder, problem_of, read_folder, remove

UNEASY = CALM | {"burst": 0.02, "late": 0.15}
"""Rates while a run is restored. Nothing is damaged: what is right to restore must not change meanwhile."""
COPIES_KEPT = 2


class WatchedMirror(MortalMirror):
    """Has the campaign read back what is claimed to be safe, at the moment of the claim."""

    def __init__(self, campaign, *args, **named):
        self._campaign = campaign
        super().__init__(*args, **named)

    def _claim(self, step):
        self._campaign.check_claim(step)
        super()._claim(step)


class Campaign:
    """One history of a run; ``counts`` says what came of it, ``wrong`` what must not have."""

    def __init__(self, work: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.counts = Counter()
        self.wrong = []

        self.output = work / "run"
        self.cache = work / "precomputed"
        self.mirror_dir = work / "drive" / "lora"
        self.run = self.mirror_dir / "run"
        self.drive = FakeDrive(work / "drive", seed)
        self.drive.root.mkdir()

        self.truth: dict[int, list[dict[str, bytes]]] = {}
        """By step, the files of all checkpoints that this run committed: after a restore steps come again."""
        self.earlier: dict[int, list[dict[str, bytes]]] = {}
        """Of a run before this one, until this one has something in the mirror."""
        self.step = 0
        self.starts = 0
        """How often the run began at step 0."""
        self.safe = 0
        """The newest step that was claimed to be safe."""
        self.kept = 0
        """Whole copies that there were at the last claim, of those that pruning keeps."""
        self.losses_then = 0
        """Files that the drive had lost by the last claim: the promises hold until it loses more."""
        self.late = False
        """Whether the drive shows some files late since the last machine was lost."""

    def play(self, rounds: int) -> None:
        """Play so many rounds; the last machine is lost after a good end."""
        with self.drive, quick():
            mirror = self.start()
            for _ in range(rounds):
                # Weather for this round alone. Without a connection the mirror waits and training does not.
                self.counts["rounds"] += 1
                self.drive.rates = dict(self.random.choice((CALM, BAD_DAY, BAD_DAY)))
                self.drive.connected = self.random.random() > 0.15
                self.drive.has_fsync = self.random.random() > 0.5
                self.train(mirror)

                if self.random.random() < 0.5:
                    self.lose_machine(mirror)
                    if self.random.random() < 0.1:
                        self.start_anew()
                    else:
                        self.restore()
                    mirror = self.start()

            # Bad days excuse a copy that is not made; after a calm one there is no excuse.
            self.calm_down()
            self.train(mirror)
            self.expect(mirror.close(PATIENCE_SECONDS) is None, "a calm drive did not get everything")
            self.expect(mirror.safe_step == self.step, "the last step is not safe")
            self.lose_machine(mirror)
            self.restore()

        for fault, count in self.drive.faults.items():
            if fault != "loss":  # which is counted when it strikes
                self.counts[f"fault: {fault}"] += count

    def start(self) -> Mirror:
        """A mirror on this machine; the user mounts again until it can be opened."""
        for _ in range(100):
            try:
                mirror = WatchedMirror(
                    self, self.mirror_dir, self.output, self.cache, IDENTITY, retry_seconds=RETRY_SECONDS
                )
                break
            except MirrorError:
                self.counts["starts refused, right when run again"] += 1
                self.drive.connected = True
        else:
            raise AssertionError("the mirror never opens")
        self.expect(mirror.folder == self.run, f"another folder, {mirror.folder}")
        self.starts += not self.step
        mirror.begin(f"start {self.starts}", self.step)
        return mirror

    def train(self, mirror: Mirror) -> None:
        """Commit and offer checkpoints; sometimes the mirror has time to follow, sometimes not."""
        for _ in range(self.random.randint(1, 3)):
            self.step += self.random.randint(1, 5)
            names = ("adapter.safetensors", "state.json")
            files = {name: self.random.randbytes(self.random.randint(1, 2000)) for name in names}
            about = {"fingerprint": IDENTITY, "start": f"start {self.starts}"}
            state = {"about": about, "rest": files["state.json"].hex()}
            files["state.json"] = json.dumps(state).encode()
            self.truth.setdefault(self.step, []).append(files)
            folder = self.output / "checkpoints" / f"step-{self.step:09d}"
            commit_folder(folder, files)
            if self.random.random() < 0.3:
                encode(self.cache, self.random.randrange(MOST), join=self.random.random() < 0.3)

            # Called between two steps of training, so it may not wait for the drive.
            started = time.monotonic()
            mirror.offer(folder)
            self.expect(time.monotonic() - started < 1, "offer() waited")
            self.counts["offers"] += 1

            if self.random.random() < 0.7:
                with mirror._changed:
                    mirror._changed.wait_for(
                        lambda: not mirror._pending, self.random.choice((0.005, 0.02, 0.2))
                    )
            # The store prunes while the mirror copies: what it is copying may vanish.
            for old in steps_in(folder.parent)[self.random.choice((1, 2)) :]:
                remove(old)

    def lose_machine(self, mirror: Mirror) -> None:
        """Stop the thread wherever it is, and take the local disk away."""
        self.counts["machines lost"] += 1
        self.expect(mirror._thread.is_alive() or mirror._over, "the thread died")

        # Its next operation on the drive is its last; a thread that sleeps is woken to end as well.
        self.drive.power = False
        with mirror._changed:
            mirror._over = True
            mirror._changed.notify_all()
        mirror._thread.join(PATIENCE_SECONDS)
        self.expect(not mirror._thread.is_alive(), "the thread hangs")
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)

        self.drive.rates = dict(self.random.choice((CALM, UNEASY)))
        self.drive.connected = self.random.random() > 0.1
        late = self.drive.faults["late"]
        self.drive.mount_elsewhere()
        self.late = self.drive.faults["late"] > late

    def restore(self) -> None:
        """On another machine: the newest whole copy comes back, or an error where there cannot be one."""
        newest, skipped, packs = self.look()  # before, since a restore may change what it finds
        self.check_kept(None)
        try:
            restored = restore(self.mirror_dir, self.output, self.cache, IDENTITY)
        except MirrorError as error:
            self.counts["restores refused, right when run again"] += 1
            self.calm_down()
            restored = self.again(newest, error)
        if newest is None:
            self.expect(restored is None or restored.step is None, "a step came from nowhere")
            self.step = self.safe = self.kept = 0
            return

        step = int(newest.name[5:])
        self.expect(restored is not None and restored.step == step, f"{restored} instead of step {step}")
        files = read_folder(self.output / "checkpoints" / newest.name)
        made = self.truth.get(step, []) + self.earlier.get(step, [])
        self.expect(files in made, f"step {step} has bytes that this run never committed")

        brought = packs_in(self.cache) if self.cache.is_dir() else set()
        self.expect(brought <= packs, "a pack that is not whole came")
        self.expect(brought == packs or self.late, "not every whole pack came")  # a late one is not listed
        self.expect(all_sound(self.cache), "a record differs")

        named = restored.skipped if restored else ()
        for folder in skipped:
            self.expect(any(folder.name in text for text in named), "a damaged copy is not named")
        # A copy that was safe may be lost by the drive itself, or belong to the run before this one.
        if self.drive.faults["lost later"] == self.losses_then and not self.earlier:
            self.expect(step >= self.safe, f"step {step} although step {self.safe} was safe")

        self.counts["restored"] += 1
        self.counts["restored an older one, newer ones named as damaged"] += bool(skipped)
        self.counts["packs restored"] += len(brought)
        self.step = self.safe = step

    def start_anew(self) -> None:
        """The user does not resume: what is in the mirror belongs to an earlier run."""
        self.counts["started anew over an earlier run"] += 1
        # Until the new run has a copy in the mirror, a restore rightly brings back the earlier one's.
        for step, made in self.truth.items():
            self.earlier.setdefault(step, []).extend(made)
        self.truth = {}
        self.step = 0
        self.kept = 0

    def again(self, newest, error):
        """The user runs the same command again, with the drive mounted; what cannot be used is moved away."""
        try:
            return restore(self.mirror_dir, self.output, self.cache, IDENTITY)
        except MirrorError as second:
            self.expect(newest is None and "is whole" in str(second), f"{second} after {error}")
            self.counts["nothing whole left"] += 1
            self.run.rename(self.run.with_name(f"old-{self.counts['nothing whole left']}"))
            return None

    def look(self):
        """What is really in the mirror: newest whole checkpoint, those above it, whole packs."""
        skipped = []
        packs = set()
        with self.drive.calm():
            cache = self.run / "precomputed"
            if cache.is_dir():
                packs = {name for name in packs_in(cache) if whole(cache / name)}
            for folder in self._copies():
                try:
                    read_folder(folder)
                    return folder, skipped, packs
                except DamagedError:
                    skipped.append(folder)
        return None, skipped, packs

    def check_claim(self, step: int) -> None:
        """In the mirror's thread, before ``safe_step`` changes."""
        self.counts["claims"] += 1
        with self.drive.calm():  # what is really there, and not what the drive shows
            try:
                files = read_folder(self.run / "checkpoints" / f"step-{step:09d}")
            except DamagedError as error:
                files = str(error)
        self.expect(files == self.truth[step][-1], f"step {step} was claimed, and is not there")
        self.check_kept(step)
        self.safe = step
        self.losses_then = self.drive.faults["lost later"]
        self.earlier = {}
        self.kept = min(COPIES_KEPT, len(self.whole_steps()))

    def check_kept(self, new: int | None) -> None:
        """Pruning leaves two whole copies, where there were two."""
        if self.drive.faults["lost later"] == self.losses_then:
            left = self.whole_steps() - {new}
            # A step that is claimed again was one of those that were kept, and is not counted now.
            required = self.kept - (new == self.safe)
            self.expect(len(left) >= required, f"{len(left)} left of {self.kept} whole copies")

    def whole_steps(self) -> set[int]:
        with self.drive.calm():
            return {int(folder.name[5:]) for folder in self._copies() if problem_of(folder) is None}

    def calm_down(self) -> None:
        self.drive.connected = True
        self.drive.has_fsync = False
        self.drive.rates = dict(CALM)

    def expect(self, holds: bool, message: str) -> None:
        """Note what went wrong and go on: one broken promise must not hide the next."""
        if not holds:
            self.wrong.append(message)

    def _copies(self) -> list[Path]:
        """Of checkpoints in the mirror, the newest first."""
        folder = self.run / "checkpoints"
        return steps_in(folder) if folder.is_dir() else []
