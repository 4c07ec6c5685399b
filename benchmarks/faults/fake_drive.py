"""A folder that behaves like Google Drive's mount on a bad day: what is done in it fails, is late, or lost.

Functions of os and io are replaced, for paths below the folder only. A loss strikes when something else is
written, never inside a series of reads: against a drive that changes while it is read nobody can claim
anything.

The words of the rates: *burst*, some operations in a row fail; *cut*, a file is damaged as soon as it is
closed; *loss*, it is damaged some operations later; *late*, it is not seen yet; *twin*, a rename leaves a
copy, ``name (1)``; *rename*, a rename is said to have failed; *torn*, it leaves one file damaged; *full*,
half of a write gets through.
"""

import builtins
import errno
import io
import os
import random
import shutil
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

CALM = dict.fromkeys(("burst", "cut", "loss", "late", "twin", "rename", "torn", "full"), 0.0)
BAD_DAY = {
    "burst": 0.015,
    "cut": 0.06,
    "loss": 0.05,
    "late": 0.05,
    "twin": 0.2,
    "rename": 0.1,
    "torn": 0.05,
    "full": 0.02,
}
"""Chance of each fault where it is possible; far above a real drive's, so that few rounds meet them all."""
BURSTS = (errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES)
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
LONGEST_BURST = 8
"""Operations."""
MOST_ASKED = 3
"""How often a late file must be asked for until it is seen."""
FARTHEST_LOSS = 60
"""Operations after a file was closed until it is lost."""

NAMES = (
    "open",
    "stat",
    "lstat",
    "listdir",
    "scandir",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "truncate",
)
REAL = {name: getattr(os, name) for name in NAMES} | {"fsync": os.fsync, "io": io.open}


class PowerCut(BaseException):
    """Nothing catches it, as nothing survives the end of a machine."""


class FakeDrive:
    """One mount; ``with drive:`` replaces the functions. ``faults`` counts what it did, by those words."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.rates = dict(CALM)
        self.connected = True
        self.power = True
        self.has_fsync = True
        self.faults = Counter()

        self.count = 0
        """Operations so far."""
        self.fail_at = 0
        """The operation, counted from 1, that fails once."""
        self.cut_at = 0
        """The operation, counted from 1, at which the machine is gone."""

        self._calm = threading.local()  # one thread looks at what is there while others meet the faults
        self._lock = threading.RLock()  # operations look at files themselves, by functions that are replaced
        self._burst = 0
        self._errno = 0
        self._late: dict[int, int] = {}  # inode to how often it must be asked for until it is seen
        self._doomed: list[tuple[int, int]] = []  # operation, inode

    def __enter__(self):
        for name in NAMES:
            setattr(os, name, self._wrap(name, REAL[name]))
        os.fsync = self._fsync
        io.open = builtins.open = self._open
        return self

    def __exit__(self, *_):
        for name in NAMES:
            setattr(os, name, REAL[name])
        os.fsync = REAL["fsync"]
        io.open = builtins.open = REAL["io"]

    @contextmanager
    def calm(self):
        """What is really there is seen by this thread."""
        before = getattr(self._calm, "on", False)
        self._calm.on = True
        try:
            yield
        finally:
            self._calm.on = before

    def mount_elsewhere(self):
        """All that is doomed is lost, and of what is there some files are seen later than their folder."""
        with self._lock, self.calm():
            self._late.clear()
            self._strike(everything=True)
            self.power = True
            self._burst = 0
            for file in sorted(self.root.rglob("*")):
                # The manifest is seen at once: a folder that looks committed without its files is hardest.
                if file.name != "manifest.json" and file.is_file() and self._chance("late"):
                    self.delay(file, self.random.randint(1, MOST_ASKED))

    def closed(self, path: Path) -> None:
        """A file was written: it may be damaged at once, later, or not be seen yet."""
        with self._lock, self.calm():
            if not path.exists():
                return
            if self._chance("cut"):
                self.damage(path)
            elif self._chance("loss"):
                # By inode: until then the file may be renamed, and is lost under its new name.
                strikes_at = self.count + self.random.randint(1, FARTHEST_LOSS)
                self._doomed.append((strikes_at, path.stat().st_ino))
            elif self._chance("late"):
                self.delay(path, self.random.randint(1, MOST_ASKED))

    def damage(self, path: Path) -> None:
        """Lose a file, its end, or what its end said; or turn one bit."""
        content = bytearray(path.read_bytes())
        fault = self.random.choice(("gone", "empty", "short", "zeros", "bit"))
        if fault == "gone":
            path.unlink()
            return

        cut = 0
        if fault != "empty" and content:
            cut = self.random.randrange(len(content))
        if fault in ("empty", "short"):
            del content[cut:]
        elif fault == "zeros":
            content[cut:] = bytes(len(content) - cut)
        elif content:
            content[cut] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)

    def delay(self, path: Path, asked: int) -> None:
        """Not to be seen until it was asked for so often."""
        self._late[REAL["stat"](path).st_ino] = asked

    def _chance(self, fault: str) -> bool:
        strikes = self.random.random() < self.rates[fault]
        self.faults[fault] += strikes
        return strikes

    def _covers(self, path) -> bool:
        if getattr(self._calm, "on", False) or not isinstance(path, str | os.PathLike):
            return False
        return self.root in (Path(path), *Path(path).parents)

    def _wrap(self, name, real):
        def wrapped(path, *args, **kwargs):
            # Names relative to an open folder come from rmtree's descent; that it opened the folder was seen.
            if kwargs.get("dir_fd") is not None or not self._covers(path):
                return real(path, *args, **kwargs)

            with self._lock:
                self._operate(path)
                if name in ("rename", "replace"):
                    return self._rename(real, path, *args)
                if name == "mkdir":
                    self._strike()
                elif name not in ("rmdir", "unlink"):  # what is not seen yet can be deleted
                    self._require_visible(path)
                result = real(path, *args, **kwargs)
                if name == "listdir":
                    return [entry for entry in result if not self._is_late(Path(path) / entry)]
                return result

        return wrapped

    def _operate(self, path) -> None:
        """Count an operation, and fail it where it is to fail."""
        self.count += 1
        if not self.power or self.count == self.cut_at:
            self.power = False
            raise PowerCut  # the machine is gone: the thread ends here, whatever it was doing
        if self.count == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if not self.connected:
            self.faults["disconnected"] += 1
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))

        # Errors of a real mount come in rows: a single retry must not be enough.
        if not self._burst and self._chance("burst"):
            self._burst = self.random.randint(1, LONGEST_BURST)
            self._errno = self.random.choice(BURSTS)
        if self._burst:
            self._burst -= 1
            raise OSError(self._errno, os.strerror(self._errno), str(path))

    def _open(self, path, mode="r", *args, **kwargs):
        if not self._covers(path):
            return REAL["io"](path, mode, *args, **kwargs)
        with self._lock:
            self._operate(path)
            if not set(mode) & set("wxa"):
                self._require_visible(path)
                return REAL["io"](path, mode, *args, **kwargs)
            self._strike()
            return _Written(self, REAL["io"](path, mode, *args, **kwargs), Path(path))

    def _rename(self, real, source, target):
        self._require_visible(source)
        if self._chance("rename"):
            if self.random.random() < 0.5:
                real(source, target)  # done, and said to have failed
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        real(source, target)

        with self.calm():
            target = Path(target)
            if self._chance("twin"):
                # Drive allows a name twice; its mount then shows the second like this.
                twin = target.with_name(f"{target.name} (1)")
                if target.is_dir():
                    shutil.copytree(target, twin, dirs_exist_ok=True)
                elif target.is_file():
                    shutil.copyfile(target, twin)

            files = sorted(target.iterdir()) if target.is_dir() else [target]
            if files and self._chance("torn"):
                self.damage(self.random.choice(files))
            elif len(files) > 1 and self._chance("late"):
                for file in files:
                    self.delay(file, self.random.randint(1, MOST_ASKED))

    def _fsync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self._covers(path) and not self.has_fsync:
            self.faults["no fsync"] += 1
            raise OSError(self.random.choice(NO_FSYNC), "fsync")
        return REAL["fsync"](descriptor)

    def _strike(self, everything: bool = False) -> None:
        """Lose the doomed files whose time has come."""
        due = {inode for at, inode in self._doomed if everything or at <= self.count}
        self._doomed = [doomed for doomed in self._doomed if doomed[1] not in due]
        if not due:
            return
        with self.calm():
            # Listed first: damage may delete, under the feet of the walk.
            lost = [path for path in self.root.rglob("*") if path.is_file() and path.stat().st_ino in due]
            for path in lost:
                self.faults["lost later"] += 1
                self.damage(path)

    def _is_late(self, path) -> bool:
        try:
            inode = REAL["lstat"](path).st_ino
        except OSError:
            return False
        asked = self._late.get(inode, 0)
        self._late[inode] = asked - 1
        return asked > 0

    def _require_visible(self, path) -> None:
        if self._is_late(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


class _Written:
    """A file that is being written: the disk may be full, and closing is no promise."""

    def __init__(self, drive: FakeDrive, file, path: Path) -> None:
        self._drive = drive
        self._file = file
        self._path = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._drive.closed(self._path)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content):
        with self._drive._lock:
            if self._drive._chance("full"):
                self._file.write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        return self._file.write(content)
