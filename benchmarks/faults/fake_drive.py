"""A folder that behaves like Google Drive's mount on a bad day: what is done below it fails, is late, or is lost.

Functions of os and io are replaced, for paths below the folder only. A loss strikes when something else is written,
never inside a series of reads: against a drive that changes while it is read nobody can claim anything.
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

BURSTS = (errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES)
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
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
LONGEST_BURST, MOST_ASKED = 8, 3
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
    """One mount; ``with drive:`` replaces the functions. ``faults`` counts what it did, by kind."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.rates, self.connected, self.power = dict(CALM), True, True
        self.has_fsync = True
        self.fail_at, self.cut_at = 0, 0
        """Operations, counted from 1, that fail once or at which the machine is gone."""
        self.faults = Counter()
        self._calm = threading.local()
        self._lock = threading.RLock()
        self.count, self._burst, self._errno = 0, 0, 0
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
        before, self._calm.on = getattr(self._calm, "on", False), True
        try:
            yield
        finally:
            self._calm.on = before

    def mount_elsewhere(self):
        """All that is doomed is lost, and of what is there some files are seen later than their folder."""
        with self._lock, self.calm():
            self._late.clear()
            self._strike(everything=True)
            self.power, self._burst = True, 0
            for file in sorted(self.root.rglob("*")):
                if file.name != "manifest.json" and file.is_file() and self._chance("late"):
                    self.delay(file, self.random.randint(1, MOST_ASKED))

    def _chance(self, kind: str) -> bool:
        hit = self.random.random() < self.rates[kind]
        self.faults[kind] += hit
        return hit

    def _covers(self, path) -> bool:
        if getattr(self._calm, "on", False) or not isinstance(path, str | os.PathLike):
            return False
        return self.root in (Path(path), *Path(path).parents)

    def _wrap(self, name, real):
        def wrapped(path, *args, **kwargs):
            if kwargs.get("dir_fd") is not None or not self._covers(path):
                return real(path, *args, **kwargs)
            with self._lock:
                self._operate(path)
                if name in ("rename", "replace"):
                    return self._rename(real, path, *args)
                if name == "mkdir":
                    self._strike()
                elif name != "rmdir" and name != "unlink":
                    self._require_visible(path)
                found = real(path, *args, **kwargs)
                return (
                    [one for one in found if not self._is_late(Path(path) / one)]
                    if name == "listdir"
                    else found
                )

        return wrapped

    def _operate(self, path) -> None:
        self.count += 1
        if not self.power or self.count == self.cut_at:
            self.power = False
            raise PowerCut  # the machine is gone: the thread ends here, whatever it was doing
        if self.count == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if not self.connected:
            self.faults["disconnected"] += 1
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))
        if not self._burst and self._chance("burst"):
            self._burst, self._errno = self.random.randint(1, LONGEST_BURST), self.random.choice(BURSTS)
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

    def closed(self, path: Path) -> None:
        """A file was written: it may be damaged at once, later, or not be seen yet."""
        with self._lock, self.calm():
            if not path.exists():
                return
            if self._chance("cut"):
                self.damage(path)
            elif self._chance("loss"):
                self._doomed.append((self.count + self.random.randint(1, 60), path.stat().st_ino))
            elif self._chance("late"):
                self.delay(path, self.random.randint(1, MOST_ASKED))

    def damage(self, path: Path) -> None:
        """Lose a file, its end, or what its end said; or turn one bit."""
        content = bytearray(path.read_bytes())
        kind = self.random.choice(("gone", "empty", "short", "zeros", "bit"))
        if kind == "gone":
            path.unlink()
            return
        cut = 0 if kind == "empty" else self.random.randrange(len(content)) if content else 0
        if kind in ("empty", "short"):
            del content[cut:]
        elif kind == "zeros":
            content[cut:] = bytes(len(content) - cut)
        elif content:
            content[cut] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)

    def _strike(self, everything: bool = False) -> None:
        due = {inode for at, inode in self._doomed if everything or at <= self.count}
        self._doomed = [one for one in self._doomed if one[1] not in due]
        if due:
            with self.calm():
                for path in [
                    path for path in self.root.rglob("*") if path.is_file() and path.stat().st_ino in due
                ]:
                    self.faults["lost later"] += 1
                    self.damage(path)

    def delay(self, path: Path, asked: int) -> None:
        """Not to be seen until it was asked for so often."""
        self._late[REAL["stat"](path).st_ino] = asked

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
        self._drive, self._file, self._path = drive, file, path

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
