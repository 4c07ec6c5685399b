"""Every operation that changes files below a folder, seen before it happens: listed, failed, torn, or the last one.

Functions of os and io are replaced, as in ``fake_drive``: pathlib, shutil and tempfile go through them. What
writes below Python, such as safetensors' own save_file, is not seen.
"""

import builtins
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REAL = {
    name: getattr(os, name) for name in ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "fsync")
}
REAL_OPEN = io.open
CRASHED = 9
SHARES = (0.0, 0.5, 1.0)
"""Of a file's bytes that are left when it is torn; of all of them one byte is missing."""


@dataclass(frozen=True)
class Operation:
    """One change, about to happen."""

    kind: str
    """create, write, fsync, rename, unlink, mkdir or rmdir; read where those are watched too."""
    path: Path
    target: Path | None = None
    content: bytes = b""
    file: Any = None
    is_folder: bool = False

    def tear(self, share: float) -> None:
        """Do a part of a write, or lose a part of what is about to be synced."""
        if self.kind == "write":
            self.file.write(self.content[: _part(len(self.content), share)])
            self.file.flush()
        else:
            os.truncate(self.path, _part(self.path.stat().st_size, share))

    @property
    def can_tear(self) -> bool:
        """Whether it is about the bytes of a file."""
        return self.kind == "write" or (self.kind == "fsync" and not self.is_folder)


def _part(size: int, share: float) -> int:
    return max(0, min(round(size * share), size - 1))


@contextmanager
def watching(root: Path, act: Callable[[Operation], None], reads: bool = False) -> Iterator[None]:
    """Call ``act`` before every change below root; it may raise, or end the process."""
    root = root.resolve()

    def tell(kind: str, path: Any, target: Any = None, **more: Any) -> None:
        place = _resolved(path)
        if root in (place, *place.parents):
            act(Operation(kind, place, _resolved(target) if target is not None else None, **more))

    for name in ("rename", "replace"):
        setattr(os, name, _moving(REAL[name], tell))
    for name, kind in (("unlink", "unlink"), ("remove", "unlink"), ("mkdir", "mkdir"), ("rmdir", "rmdir")):
        setattr(os, name, _changing(REAL[name], kind, tell))
    os.fsync = _syncing(tell)
    io.open = builtins.open = _opening(tell, reads)
    try:
        yield
    finally:
        for name, function in REAL.items():
            setattr(os, name, function)
        io.open = builtins.open = REAL_OPEN


def operations(root: Path, work: Callable[[], object], reads: bool = False) -> list[Operation]:
    """What the work does below root."""
    found: list[Operation] = []
    with watching(root, found.append, reads):
        work()
    return found


def crash(root: Path, work: Callable[[], object], number: int, tear: float | None = None) -> int:
    """Do the work in a child that ends before its operation of this number; returns the child's exit code.

    Args:
        root: Whose operations count.
        work: What is to be interrupted.
        number: Of the operation, from 0 on.
        tear: Do or keep this share of it first, where it is about the bytes of a file.
    """
    child = os.fork()
    if child == 0:
        _crash(root, work, number, tear)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def places(found: list[Operation], shares: tuple[float, ...]) -> Iterator[tuple[int, float | None]]:
    """Each moment to crash at: the number of an operation, and what is torn in it."""
    for number, one in enumerate(found):
        yield number, None
        for share in shares if one.can_tear else ():
            yield number, share


@contextmanager
def failing(root: Path, number: int, code: int, lasting: bool) -> Iterator[list[Operation]]:
    """Raise OSError at the operation of this number, reads counted, and at all later ones if lasting.

    Yields what was failed.
    """
    count, failed = 0, []

    def act(one: Operation) -> None:
        nonlocal count
        count += 1
        if count - 1 == number or (lasting and count > number):
            failed.append(one)
            raise OSError(code, os.strerror(code), str(one.path))

    with watching(root, act, reads=True):
        yield failed


@contextmanager
def without_syncing() -> Iterator[None]:
    """Save time where only the process ends: what it wrote is in the kernel, and nobody asks the disk."""
    real, REAL["fsync"] = REAL["fsync"], lambda file: None
    os.fsync = REAL["fsync"]
    try:
        yield
    finally:
        REAL["fsync"] = os.fsync = real


def kinds(found: list[Operation]) -> Counter[str]:
    """How many of each kind."""
    return Counter(one.kind for one in found)


def _crash(root: Path, work: Callable[[], object], number: int, tear: float | None) -> None:
    count = 0

    def act(one: Operation) -> None:
        nonlocal count
        if count == number:
            if tear is not None and one.can_tear:
                one.tear(tear)
            os._exit(CRASHED)
        count += 1

    code = 1
    try:
        silence()
        with watching(root, act):
            work()
        code = 0
    finally:
        os._exit(code)


def silence() -> None:
    """Let nothing of this process be printed from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _resolved(path: Any) -> Path:
    return Path(os.path.abspath(os.fspath(path)))


def _inside(path: Any, folder: int | None) -> Any:
    return path if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))


def _syncing(tell: Callable[..., None]) -> Callable[[Any], None]:
    def syncing(file: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
        tell("fsync", path, is_folder=os.path.isdir(path))
        REAL["fsync"](file)

    return syncing


def _moving(real: Callable[..., None], tell: Callable[..., None]) -> Callable[..., None]:
    def moving(path: Any, target: Any, **options: Any) -> None:
        tell("rename", path, target)
        real(path, target, **options)

    return moving


def _changing(real: Callable[..., None], kind: str, tell: Callable[..., None]) -> Callable[..., None]:
    def changing(path: Any, *arguments: Any, **options: Any) -> None:
        tell(kind, _inside(path, options.get("dir_fd")))
        real(path, *arguments, **options)

    return changing


def _opening(tell: Callable[..., None], reads: bool) -> Callable[..., Any]:
    def opening(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(path, int):
            return REAL_OPEN(path, mode, *arguments, **options)
        changes = set(mode) & set("wax+")
        if changes and not ("a" in mode and os.path.exists(path)):
            tell("create", path)
        elif reads and not changes:
            tell("read", path)
        file = REAL_OPEN(path, mode, *arguments, **options)
        return _File(file, path, tell) if changes else file

    return opening


class _File:
    """A file that tells of its writes, and is like any other otherwise."""

    def __init__(self, file: Any, path: Any, tell: Callable[..., None]) -> None:
        self._file, self._path, self._tell = file, path, tell

    def write(self, content: Any) -> int:
        data = content.encode() if isinstance(content, str) else bytes(content)
        raw = self._file.buffer if hasattr(self._file, "buffer") else self._file
        self._tell("write", self._path, content=data, file=raw)
        return self._file.write(content)

    def __enter__(self) -> "_File":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
