"""A file system that behaves as Windows' does, on Linux: what is open can be neither renamed nor deleted."""

import errno
import os
import re
import shutil
import stat
from pathlib import Path

ABSENT = ("O_NONBLOCK", "pread", "posix_fadvise", "getuid", "geteuid", "fork", "mkfifo")
# Of a name on its way into a folder (Microsoft, "Naming files, paths, and namespaces").
ILLEGAL = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(CON|PRN|AUX|NUL|COM\d|LPT\d)(\.|$)', re.IGNORECASE)
REAL = {name: getattr(os, name) for name in ("open", "rename", "replace", "unlink", "remove", "rmdir")}
REAL |= {"mkdir": os.mkdir}


class Windows:
    """What was refused, and which names were given."""

    def __init__(self, monkeypatch, folder):
        self.folder = Path(folder).resolve()
        self.refused = []
        self.names = set()
        self.waits = 0
        for name in ABSENT:
            monkeypatch.delattr(os, name, raising=False)
        monkeypatch.setattr(shutil, "_use_fd_functions", False)  # it would open folders
        monkeypatch.setattr("lora_utils.system.portable.resource", None)
        monkeypatch.setattr("lora_utils.system.ownership.fcntl", None)
        monkeypatch.setattr("time.sleep", self._sleep)
        for name in REAL:
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))

    def _sleep(self, seconds):
        self.waits += 1

    def _mine(self, path):
        return isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(self.folder)

    def _named(self, path):
        if self._mine(path):
            assert not ILLEGAL.search(Path(path).name), path
            self.names.add(Path(path).name)

    def _open(self, path, flags, *more, **named):
        if self._mine(path):
            if os.path.isdir(path):
                self._refuse("open", path)
            if flags & os.O_CREAT:
                self._named(path)
        return REAL["open"](path, flags, *more, **named)

    def _mkdir(self, path, *more, **named):
        self._named(path)
        return REAL["mkdir"](path, *more, **named)

    def _rename(self, source, target, **named):
        if self._mine(target):
            self._require_closed("rename", source)
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "Cannot create a file when that file exists", str(target))
            self._named(target)
        return REAL["rename"](source, target, **named)

    def _replace(self, source, target, **named):
        if self._mine(target):
            self._require_closed("replace", source)
            self._require_closed("replace", target)
            if os.path.isdir(target):
                self._refuse("replace", target)
            self._named(target)
        return REAL["replace"](source, target, **named)

    def _unlink(self, path, **named):
        self._require_closed("unlink", path)
        return REAL["unlink"](path, **named)

    _remove = _unlink

    def _rmdir(self, path, **named):
        self._require_closed("rmdir", path)
        return REAL["rmdir"](path, **named)

    def _require_closed(self, action, path):
        if not self._mine(path):
            return
        real = Path(path).absolute()
        if any(held == real or real in held.parents for held in held_files()):
            self._refuse(action, path)

    def _refuse(self, action, path):
        self.refused.append((action, Path(path).name))
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))


def held_files():
    """What this process has open or mapped into its memory."""
    held = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
            if stat.S_ISREG(os.stat(link).st_mode):
                held.add(Path(target))
        except OSError:  # the descriptor that lists them
            continue
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return held | {Path(line.split(maxsplit=5)[5]) for line in maps if line.count("/")}
