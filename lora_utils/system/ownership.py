"""One writer to a folder: a lock that dies with its process, and says who holds it.

The lock is the operating system's (flock; on Windows a locked byte), so nothing is to be cleaned up after a
kill: a file that nobody holds is none. Who holds it stands in it. Only writers ask: whoever reads goes on
beside one.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_utils import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
msvcrt: Any = import_module("msvcrt") if os.name == "nt" else None

LOGGER = logging.getLogger(__name__)
LOCK_NAME = ".owner.json"
OWNER_BYTES = 4096
LOCKED_BYTE = 2**30
"""What Windows locks cannot be read by others: a byte far behind all that the file says."""
HELD_ERRORS = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
ASK_SECONDS = 0.5
"""Between two looks whether a folder is free."""
TOLD_AFTER_SECONDS = 2.0
"""Of waiting: most owners are done before."""

_guard = threading.RLock()
_held: dict[tuple[int, int], "_Hold"] = {}
"""By device and inode of the locked file, what this process holds: the system's lock would refuse itself."""
_told: set[Path] = set()


class InUseError(UserError):
    """Somebody else writes into the folder."""


@dataclass(frozen=True, eq=False)
class _Hold:
    path: Path
    descriptor: int
    give_way: Callable[[], object] | None
    thread: int = field(default_factory=threading.get_ident)


class Ownership:
    """The right to write into a folder; ends with ``release``, its last reference, or the process."""

    def __init__(self, key: tuple[int, int] | None = None, hold: _Hold | None = None) -> None:
        """Keep a lock; without one, where there can be none, everything is as if there were."""
        self.release = weakref.finalize(self, _let_go, key, hold)
        """Let others in; a second time nothing happens."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def own(folder: Path, deed: str, ways: str, give_way: Callable[[], object] | None = None) -> Ownership:
    """Become the one writer to a folder, which is made.

    Args:
        folder: What is written into.
        deed: What is done, for whoever else comes: "trains into".
        ways: What whoever else can do, beside waiting.
        give_way: Ends this writer, where the same process comes again: a notebook's cell that was
            interrupted leaves one behind. Without it the second is refused.

    Raises:
        InUseError: Another process is its writer, or another thread; names it.
    """
    ownership = _ask(folder, deed, give_way)
    if ownership is None and _end_earlier(folder):
        ownership = _ask(folder, deed, give_way)
    if ownership is None:
        raise InUseError(f"{_owner_of(folder)} {folder}; wait for it, stop it, or {ways}")
    return ownership


def own_in_turn(folder: Path, deed: str, is_needless: Callable[[], bool] = lambda: False) -> Ownership:
    """Wait until a folder has no other writer, which is told once, and become its writer.

    Args:
        folder: What is written into; made.
        deed: What is done, for whoever else comes: "fills".
        is_needless: Asked once, where there is another writer: whether there is anything to wait for.
    """
    started = time.monotonic()
    is_told = False
    ownership = _ask(folder, deed, None)
    if ownership is None and is_needless():
        return Ownership()
    while ownership is None:
        if not is_told and time.monotonic() - started >= TOLD_AFTER_SECONDS:
            LOGGER.warning("%s %s; waiting until it is done", _owner_of(folder), folder)
            is_told = True
        time.sleep(ASK_SECONDS)
        ownership = _ask(folder, deed, None)
    return ownership


def describe_self() -> dict[str, Any]:
    """What tells others of this process: its id, its machine, and the time."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now}


def describe(owner: Any) -> str:
    """What ``describe_self`` gave, in words; whatever else it is, another process."""
    try:
        since = datetime.fromisoformat(owner["since"]).astimezone()
        pid = int(owner["pid"])
        host = f"{owner['host']:.80}"
    except (ValueError, TypeError, LookupError, OverflowError):
        return "another process"
    if (pid, host) == (os.getpid(), socket.gethostname()):
        return "another thread of this process"
    is_today = since.date() == datetime.now().date()
    return f"another process (pid {pid} on {host}, since {since:{'%H:%M' if is_today else '%Y-%m-%d %H:%M'}})"


def _ask(folder: Path, deed: str, give_way: Callable[[], object] | None) -> Ownership | None:
    """The folder's lock; None where somebody has it."""
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(path)
    except OSError:  # what cannot be written needs no lock; whatever else is wrong, writing will say
        return Ownership()
    key = _key_of(os.fstat(descriptor))
    with _guard:
        hold = _held.get(key)
        try:
            if hold is None:
                _lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in HELD_ERRORS:
                return None
            _tell_without(folder, error)  # NFS without its lock server, some mounted drives
            return Ownership()
        if hold is not None:
            os.close(descriptor)
            # Who holds it already and asks again must not wait for itself.
            return Ownership() if hold.thread == threading.get_ident() and hold.give_way is None else None
        if key != _key_at(path):  # whoever had it took it away between opening and locking
            os.close(descriptor)
            return _ask(folder, deed, give_way)
        _leave_to_parents()
        _held[key] = mine = _Hold(path, descriptor, give_way)
    _write(descriptor, json.dumps(describe_self() | {"deed": deed}).encode())
    return Ownership(key, mine)


def _end_earlier(folder: Path) -> bool:
    """Have an earlier writer of this process end; False where there is none, or another thread runs it."""
    key = _key_at(folder / LOCK_NAME)
    hold = _held.get(key) if key else None
    if hold is None or hold.give_way is None:
        return False
    LOGGER.warning("an earlier call that writes into %s had not ended; it is ended first", folder)
    try:
        hold.give_way()
    except ValueError:  # what Python says of a generator that runs at this moment
        return False
    # It has ended; only the traceback of an error, which a notebook keeps, may still refer to the lock.
    _let_go(key, hold)
    return True


def _let_go(key: tuple[int, int] | None, hold: _Hold | None) -> None:
    with _guard:
        # In a forked child it is not there: the lock is the parent's.
        if key is None or hold is None or _held.get(key) is not hold:
            return
        del _held[key]
    _write(hold.descriptor, b"")  # an owner's name without an owner would mislead
    if fcntl is None:
        # Windows deletes nothing that is open: neither now, nor when somebody else has opened it meanwhile.
        _close(hold)
        _take_away(hold.path)
        return
    if key == _key_at(hold.path):  # else somebody deleted it, and it is another's now
        _take_away(hold.path)
    # After that: once unlocked it may be another's, and would be taken from under it.
    _close(hold)


def _close(hold: _Hold) -> None:
    _unlock(hold.descriptor)
    os.close(hold.descriptor)


def _take_away(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _key_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _key_at(path: Path) -> tuple[int, int] | None:
    try:
        return _key_of(path.lstat())
    except OSError:
        return None


def _open(path: Path) -> int:
    # Not through a link: what it leads to would be overwritten.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o666)


def _lock(descriptor: int) -> None:
    """Lock an open file; raises an OSError of HELD_ERRORS where another process has."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def _unlock(descriptor: int) -> None:
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    elif msvcrt is not None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)


@cache
def _leave_to_parents() -> None:
    """A forked child shares open files, and would keep their locks when this process is gone."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_forget_in_child
        )


def _forget_in_child() -> None:
    for hold in _held.values():
        os.close(hold.descriptor)
    _held.clear()
    _guard.release()


def _write(descriptor: int, content: bytes) -> None:
    with suppress(OSError):  # a full disk: the lock holds without its words
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, content)
        os.ftruncate(descriptor, len(content))


def _tell_without(folder: Path, error: OSError) -> None:
    if folder not in _told:
        _told.add(folder)
        LOGGER.warning(
            "%s cannot be locked (%s); see to it that no other process writes into it", folder, error.strerror
        )


def _owner_of(folder: Path) -> str:
    """Who has a folder, and what it does with it."""
    owner = None
    with suppress(OSError, ValueError, RecursionError):
        owner = json.loads((folder / LOCK_NAME).read_bytes()[:OWNER_BYTES])
    deed = owner.get("deed") if isinstance(owner, dict) else None
    return f"{describe(owner)} {deed if isinstance(deed, str) else 'writes into'}"
