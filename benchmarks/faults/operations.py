"""Every operation that changes files below a folder, seen before it happens: listed, failed, torn, or last.

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
"""Exit code of a child that ended where it was told to; 0 and 1 are those of one that ended by itself."""
SHARES = (0.0, 0.5, 1.0)
"""Of a file's bytes that are left when it is torn; of all of them one byte is missing."""


@dataclass(frozen=True)
class Operation:
    """One change, about to happen."""

    action: str
    """create, write, fsync, rename, unlink, mkdir or rmdir; read where those are watched too."""
    path: Path
    target: Path | None = None
    """Of a rename."""
    content: bytes = b""
    """Of a write."""
    file: Any = None
    """Of a write: the real file, below buffers of text."""
    is_folder: bool = False
    """Whether it is a folder that is synced."""

    def tear(self, share: float) -> None:
        """Do a part of a write, or lose a part of what is about to be synced."""
        if self.action == "write":
            self.file.write(self.content[: _torn_size(len(self.content), share)])
            self.file.flush()  # os._exit follows, which would drop Python's buffer and with it the tear
        else:
            os.truncate(self.path, _torn_size(self.path.stat().st_size, share))

    @property
    def can_tear(self) -> bool:
        """Whether it is about the bytes of a file."""
        return self.action == "write" or (self.action == "fsync" and not self.is_folder)


def _torn_size(size: int, share: float) -> int:
    # At least a byte is missing: a file that is whole would not be torn.
    return max(0, min(round(size * share), size - 1))


@contextmanager
def watching(root: Path, act: Callable[[Operation], None], reads: bool = False) -> Iterator[None]:
    """Call ``act`` before every change below root; it may raise, or end the process.

    Args:
        root: Folder whose changes count, itself included.
        act: Called in the thread that makes the change.
        reads: Whether opening a file to read it counts too.
    """
    root = root.resolve()

    def tell(action: str, path: Any, target: Any = None, **details: Any) -> None:
        changed = _absolute(path)
        if root in (changed, *changed.parents):
            act(Operation(action, changed, _absolute(target) if target is not None else None, **details))

    for name in ("rename", "replace"):
        setattr(os, name, _moving(REAL[name], tell))
    for name, action in (
        ("unlink", "unlink"),
        ("remove", "unlink"),  # one system call under two names
        ("mkdir", "mkdir"),
        ("rmdir", "rmdir"),
    ):
        setattr(os, name, _changing(REAL[name], action, tell))
    os.fsync = _syncing(tell)
    io.open = builtins.open = _opening(tell, reads)  # pathlib asks io's, everybody else the builtin one
    try:
        yield
    finally:
        for name, function in REAL.items():
            setattr(os, name, function)
        io.open = builtins.open = REAL_OPEN


def operations(root: Path, work: Callable[[], object], reads: bool = False) -> list[Operation]:
    """What the work does below root, in order."""
    done: list[Operation] = []
    with watching(root, done.append, reads):
        work()
    return done


def moments(done: list[Operation], shares: tuple[float, ...]) -> Iterator[tuple[int, float | None]]:
    """Each moment to crash at: the number of an operation, and what share of its bytes is left if torn."""
    for number, operation in enumerate(done):
        yield number, None
        for share in shares if operation.can_tear else ():
            yield number, share


def crash(root: Path, work: Callable[[], object], number: int, tear: float | None = None) -> int:
    """Do the work in a child that ends before its operation of this number.

    Args:
        root: Folder whose operations count.
        work: What is to be interrupted.
        number: Of the operation, from 0 on.
        tear: Do or keep this share of it first, where it is about the bytes of a file.

    Returns: The child's exit code: ``CRASHED``, 0 where the work had no such operation, 1 where it failed by
        itself.
    """
    child = os.fork()
    if child == 0:
        _crash(root, work, number, tear)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _crash(root: Path, work: Callable[[], object], number: int, tear: float | None) -> None:
    count = 0

    def act(operation: Operation) -> None:
        nonlocal count
        if count == number:
            if tear is not None and operation.can_tear:
                operation.tear(tear)
            os._exit(CRASHED)  # no finally, no atexit, no flush: what a kill leaves
        count += 1

    code = 1
    try:
        silence()
        with watching(root, act):
            work()
        code = 0
    finally:
        os._exit(code)  # the child must never return into its parent's test or campaign


@contextmanager
def failing(root: Path, number: int, code: int, lasting: bool) -> Iterator[list[Operation]]:
    """Raise OSError at one operation, reads counted.

    Args:
        root: Folder whose operations count.
        number: Of the operation, from 0 on.
        code: Of ``errno``.
        lasting: Whether all later operations fail too.

    Yields:
        The operations that were failed, growing while the block runs.
    """
    count = 0
    failed = []

    def act(operation: Operation) -> None:
        nonlocal count
        count += 1
        if count - 1 == number or (lasting and count > number):
            failed.append(operation)
            raise OSError(code, os.strerror(code), str(operation.path))

    with watching(root, act, reads=True):
        yield failed


@contextmanager
def without_syncing() -> Iterator[None]:
    """Save time where only the process ends: what it wrote is in the kernel, and nobody asks the disk."""
    real = REAL["fsync"]
    REAL["fsync"] = lambda file: None  # there too, since ``watching`` puts back what it finds there
    os.fsync = REAL["fsync"]
    try:
        yield
    finally:
        REAL["fsync"] = os.fsync = real


def count_actions(done: list[Operation]) -> Counter[str]:
    """How many operations there are of each action."""
    return Counter(operation.action for operation in done)


def silence() -> None:
    """Let nothing of this process be printed from now on."""
    # Descriptors and not sys.stdout: libraries below Python print as well.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _absolute(path: Any) -> Path:
    # Not resolve(): it would follow the link that is about to be deleted, and ask the disk on the way.
    return Path(os.path.abspath(os.fspath(path)))


def _inside(path: Any, folder: int | None) -> Any:
    # shutil.rmtree names files relative to the open folder that they are in.
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


def _changing(real: Callable[..., None], action: str, tell: Callable[..., None]) -> Callable[..., None]:
    def changing(path: Any, *arguments: Any, **options: Any) -> None:
        tell(action, _inside(path, options.get("dir_fd")))
        real(path, *arguments, **options)

    return changing


def _opening(tell: Callable[..., None], reads: bool) -> Callable[..., Any]:
    def opening(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(path, int):  # a descriptor, of which nobody knows the name
            return REAL_OPEN(path, mode, *arguments, **options)

        changes = set(mode) & set("wax+")
        is_appended = "a" in mode and os.path.exists(path)  # nothing changes before the first write
        if changes and not is_appended:
            tell("create", path)
        elif reads and not changes:
            tell("read", path)

        file = REAL_OPEN(path, mode, *arguments, **options)
        return _File(file, path, tell) if changes else file

    return opening


class _File:
    """A file that tells of its writes, and is like any other otherwise."""

    def __init__(self, file: Any, path: Any, tell: Callable[..., None]) -> None:
        self._file = file
        self._path = path
        self._tell = tell

    def write(self, content: Any) -> int:
        data = content.encode() if isinstance(content, str) else bytes(content)
        raw = self._file.buffer if hasattr(self._file, "buffer") else self._file  # takes bytes, to be torn
        self._tell("write", self._path, content=data, file=raw)
        return self._file.write(content)

    def __enter__(self) -> "_File":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
