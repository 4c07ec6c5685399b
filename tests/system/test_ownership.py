"""One writer to a folder: real processes, and what other systems do instead."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_utils.system import ownership
from lora_utils.system.ownership import LOCK_NAME, InUseError, describe, describe_self, own, own_in_turn

OWNER = """
import os, sys, time
from pathlib import Path
from lora_utils.system.ownership import own
held = own(Path(sys.argv[1]), "trains into", "choose another output_dir")
{more}
print("mine", flush=True)
time.sleep(60)
"""
FORKS = """
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, b"1")  # it runs: until then it holds what it was born with
    time.sleep(60)
os.read(reading, 1)
print(child, flush=True)
"""


def train_into(folder, give_way=None):
    return own(folder, "trains into", "choose another output_dir", give_way)


@pytest.fixture
def another_process(tmp_path):
    """Starts a process that owns the folder; returns it, when it does, with the lines that it said before."""
    started = []

    def start(more="", folder=tmp_path):
        code = OWNER.format(more=more)
        process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
        started.append(process)
        lines = []
        while (line := process.stdout.readline().strip()) != "mine":
            assert line
            lines.append(line)
        return process, lines

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_another_process_is_named_and_what_to_do(another_process, tmp_path):
    owner, _ = another_process()
    host = re.escape(socket.gethostname())
    with pytest.raises(InUseError) as told:
        train_into(tmp_path)
    said = rf"another process \(pid {owner.pid} on {host}, since \d\d:\d\d\) trains into {tmp_path}; "
    told.match(said + "wait for it, stop it, or choose another output_dir$")
    with train_into(tmp_path / "beside"):
        pass


def test_the_lock_dies_with_its_process_and_the_next_one_gets_it(another_process, tmp_path):
    for _ in range(2):
        owner, _ = another_process()
        owner.kill()
        owner.wait()
    with train_into(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_bytes())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_forked_child_that_lives_on_does_not_keep_the_lock(another_process, tmp_path):
    owner, [child] = another_process(FORKS)
    with pytest.raises(InUseError):
        train_into(tmp_path)
    owner.kill()
    owner.wait()
    try:
        train_into(tmp_path).release()
    finally:
        os.kill(int(child), 9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_forked_child_neither_holds_nor_releases_its_parents_lock(another_process, tmp_path):
    held = train_into(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            train_into(tmp_path)
        except InUseError:
            held.release()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(InUseError):
        subprocess_owns(tmp_path)
    held.release()
    subprocess_owns(tmp_path)


def subprocess_owns(folder):
    code = OWNER.format(more="sys.exit()")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    if "InUseError" in done.stderr:
        raise InUseError(done.stderr)
    assert done.returncode == 0


def test_a_descriptor_is_not_handed_on_to_programs(tmp_path):
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    with train_into(tmp_path):
        new = set(os.listdir("/proc/self/fd")) - before if before else set()
        inherited = [
            name for name in new if Path(f"/proc/self/fd/{name}").exists() and os.get_inheritable(int(name))
        ]
        assert inherited == []


def test_an_earlier_call_of_this_process_is_ended_first(tmp_path, caplog):
    ended = []

    def steps(name, give_way):
        with train_into(tmp_path, give_way):
            try:
                yield name
                yield name
            finally:
                ended.append(name)

    def start(name):
        running = steps(name, lambda: itself().close())
        itself = weakref.ref(running)
        return running

    first = start("first")  # a notebook's cell that was interrupted: nobody closes it
    assert next(first) == "first"
    second = start("second")
    assert next(second) == "second"
    assert ended == ["first"]
    assert "had not ended; it is ended first" in caplog.text
    assert list(first) == []
    assert list(second) == ["second"]
    assert list(start("third")) == ["third", "third"]


def test_a_call_that_failed_and_whose_traceback_is_kept_is_over(tmp_path):
    kept = train_into(tmp_path, lambda: None)
    with train_into(tmp_path, lambda: None):
        kept.release()
        with pytest.raises(InUseError):
            subprocess_owns(tmp_path)


def test_a_call_that_runs_at_this_moment_is_not_ended(tmp_path):
    def busy():
        raise ValueError("generator already executing")

    with train_into(tmp_path, busy), pytest.raises(InUseError, match="another thread of this process trains"):
        train_into(tmp_path, busy)


def test_the_last_reference_gives_a_folder_up(tmp_path):
    held = train_into(tmp_path)
    del held
    with train_into(tmp_path) as held:
        held.release()
        with train_into(tmp_path):
            held.release()  # a second time: the lock is another's now
            assert (tmp_path / LOCK_NAME).read_bytes() != b""


def test_a_file_that_is_taken_away_while_it_is_opened_is_not_the_lock(tmp_path, monkeypatch):
    held = train_into(tmp_path)
    opened = []

    def open_late(path):
        opened.append(os.open(path, os.O_RDWR | os.O_CREAT))
        held.release()  # between opening and locking
        return opened[-1]

    monkeypatch.setattr(ownership, "_open", open_late)
    with train_into(tmp_path):
        assert len(opened) == 2
        with pytest.raises(InUseError):
            subprocess_owns(tmp_path)


def test_a_run_folder_that_is_deleted_under_its_owner_is_free(tmp_path):
    held = train_into(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with train_into(tmp_path / "run"):
        held.release()
        with pytest.raises(InUseError):
            subprocess_owns(tmp_path / "run")


def test_two_names_of_one_folder_are_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")

    def busy():
        raise ValueError

    with train_into(tmp_path / "run", busy), pytest.raises(InUseError):
        train_into(tmp_path / "link")


def test_whoever_waits_is_told_once_and_goes_on(another_process, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ownership, "ASK_SECONDS", 0.01)
    monkeypatch.setattr(ownership, "TOLD_AFTER_SECONDS", 0.03)
    owner, _ = another_process()
    threading.Timer(0.3, owner.kill).start()
    with own_in_turn(tmp_path, "fills"):
        assert [f"(pid {owner.pid} on" in text and "waiting until" in text for text in caplog.messages] == [
            True
        ]


def test_who_needs_nothing_waits_for_nobody(another_process, tmp_path):
    another_process()
    own_in_turn(tmp_path, "fills", lambda: True).release()


def test_threads_of_one_process_wait_for_each_other_and_nobody_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "ASK_SECONDS", 0.01)
    order = []

    def other():
        with own_in_turn(tmp_path, "fills"):
            order.append("other")

    with own_in_turn(tmp_path, "fills"), own_in_turn(tmp_path, "fills"):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


@pytest.mark.parametrize("number", ["ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EIO"])
def test_where_nothing_can_be_locked_the_work_goes_on_and_it_is_said_once(
    tmp_path, monkeypatch, caplog, number
):
    def refuse(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(ownership, "_lock", refuse)
    for _ in range(2):
        with train_into(tmp_path), own_in_turn(tmp_path, "fills"):
            pass
    assert len(caplog.messages) == 1
    assert "see to it that no other process writes into it" in caplog.text


@pytest.mark.parametrize("number", ["EROFS", "EACCES", "EPERM", "ENOSPC"])
def test_what_cannot_be_written_is_not_locked(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(ownership, "_open", refuse)
    with train_into(tmp_path), train_into(tmp_path):
        pass
    assert caplog.messages == []


def test_a_link_in_the_locks_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).symlink_to(tmp_path / "precious")
    train_into(tmp_path / "run").release()
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_windows_locks_a_byte_that_nobody_reads(tmp_path, monkeypatch):
    """Its locks belong to the open file: here as there, a second open one is refused."""
    locked = {}

    def locking(descriptor, mode, size):
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == ownership.LOCKED_BYTE
        if mode == "unlock":
            del locked[descriptor]
        elif locked:
            raise OSError(errno.EACCES, "Permission denied")
        else:
            locked[descriptor] = size

    monkeypatch.setattr(ownership, "fcntl", None)
    monkeypatch.setattr(
        ownership, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="lock", LK_UNLCK="unlock")
    )
    held = train_into(tmp_path)
    assert json.loads((tmp_path / LOCK_NAME).read_bytes())["pid"] == os.getpid()
    monkeypatch.setattr(ownership, "_held", {})  # as another process sees it
    with pytest.raises(InUseError):
        train_into(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(ownership, "fcntl", None)
    monkeypatch.setattr(
        ownership, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="lock", LK_UNLCK="unlock")
    )
    held.release()
    assert locked == {}
    train_into(tmp_path).release()


@pytest.mark.parametrize(
    "content", [None, [], {}, "x", {"pid": "1"}, {"pid": [], "host": 3, "since": "now"}, {"since": 1}]
)
def test_an_owner_that_says_nothing_sensible_is_another_process(content):
    assert describe(content) == "another process"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 99999])
def test_a_locked_file_of_nonsense_is_another_process(another_process, tmp_path, content):
    another_process()
    (tmp_path / LOCK_NAME).write_bytes(content)
    with pytest.raises(InUseError, match=r"another process writes into .*; wait for it"):
        train_into(tmp_path)


def test_an_owner_of_yesterday_comes_with_the_date():
    told = describe(describe_self() | {"pid": 7, "since": "2026-01-02T03:04:05+00:00"})
    assert "(pid 7 on " in told
    assert "since 2026-01-0" in told
