"""What Windows and macOS lack or refuse, imitated here: each has its branch, and whole runs pass."""

import errno
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from lora_utils import stages
from lora_utils.cli import main
from lora_utils.data.images import read_bytes
from lora_utils.system import files, portable, signals
from tests.system.windows import Windows, held_files

linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the imitation asks Linux what is open")


@pytest.fixture
def windows(monkeypatch, tmp_path):
    return Windows(monkeypatch, tmp_path)


@linux
def test_the_imitation_refuses_what_windows_refuses(windows, tmp_path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "a"
    path.write_bytes(b"x")
    actions = [path.unlink, lambda: path.rename(tmp_path / "b"), lambda: path.replace(tmp_path / "b")]
    actions.append(lambda: path.parent.rename(tmp_path / "c"))
    with path.open("rb"):
        assert path in held_files()
        for action in actions:
            with pytest.raises(PermissionError):
                action()
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(FileExistsError):
        path.rename(tmp_path / "folder")
    path.unlink()


@linux
def test_files_and_folders_are_committed_set_aside_and_removed(windows, tmp_path):
    files.write_atomically(tmp_path / "a.txt", b"first")
    files.write_atomically(tmp_path / "a.txt", b"second")
    assert (tmp_path / "a.txt").read_bytes() == b"second"
    assert read_bytes(tmp_path / "a.txt", tmp_path) == b"second"
    files.commit_folder(tmp_path / "step-1", {"x": b"x", "y": b"y"})
    assert files.read_folder(tmp_path / "step-1") == {"x": b"x", "y": b"y"}
    files.remove(tmp_path / "step-1")
    files.set_aside(tmp_path / "a.txt")
    assert [name[:5] for name in os.listdir(tmp_path)] == [".bad-"]


@linux
@pytest.mark.parametrize("refusals", [1, 2, 3])
def test_what_a_scanner_holds_for_a_moment_is_waited_for(windows, monkeypatch, tmp_path, refusals):
    """A scanner that opens the new file, and lets go of it after some tries."""
    target = tmp_path / "a.txt"
    target.write_bytes(b"old")
    scanner = target.open("rb")
    monkeypatch.setattr("time.sleep", lambda seconds: len(windows.refused) == refusals and scanner.close())
    files.write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert windows.refused[:refusals] == [("replace", "a.txt")] * refusals
    assert [action for action, _ in windows.refused[refusals:]] == ["open"]  # of the folder, to sync it


@linux
def test_what_stays_open_elsewhere_is_an_error_that_keeps_the_old_file(windows, tmp_path):
    target = tmp_path / "a.txt"
    target.write_bytes(b"old")
    with target.open("rb"), pytest.raises(PermissionError, match=r"a\.txt"):
        files.write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


@linux
def test_a_whole_run_passes_where_nothing_open_can_be_renamed(windows, make_config, tmp_path):
    """Encoding, checkpoints, pruning, a mirror, going on, and two comparisons in the same folder."""
    (tmp_path / "mirror").mkdir()
    quick = {
        "mirror_dir": tmp_path / "mirror",
        "precompute_dir": tmp_path / "cache",
        "checkpointing_steps": 1,
    }
    for steps in (3, 5):
        config = make_config(**quick, max_train_steps=steps, resume_from_checkpoint="latest")
        assert len(list(stages.train(config))) == (3 if steps == 3 else 2)
        stages.compare(config)
    assert (config.paths.output_dir / "compare" / "sheet.png").exists()
    assert list((tmp_path / "mirror").rglob("manifest.json"))
    # Folders cannot be opened to be synced, and that is all that was refused.
    assert {action for action, _ in windows.refused} == {"open"}
    assert len(windows.names) > 10


@linux
def test_joined_packs_go_and_damaged_ones_are_set_aside(windows, monkeypatch, make_config, tmp_path):
    monkeypatch.setattr("lora_utils.precompute.cache.FLUSH_BYTES", 0)  # a pack for each record
    config = make_config(precompute_dir=tmp_path / "cache")
    stages.precompute(config)
    [*packs] = (tmp_path / "cache").rglob("*.safetensors")
    assert len(packs) == 2  # of twenty: one of captions, one of images
    packs[0].write_bytes(packs[0].read_bytes()[:-1])
    again = stages.precompute(config)
    assert len(again.entries) == 10
    assert list((tmp_path / "cache").rglob(".bad-*"))
    assert {action for action, _ in windows.refused} == {"open"}


def test_bytes_are_read_alike_with_and_without_pread(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"0\r\n\x1a456")
    descriptor = portable.open_descriptor(tmp_path / "a")
    expected = [portable.read_at(descriptor, size, start) for size, start in ((3, 4), (2, 0), (9, 5), (1, 7))]
    monkeypatch.delattr(os, "pread", raising=False)
    assert [
        portable.read_at(descriptor, size, start) for size, start in ((3, 4), (2, 0), (9, 5), (1, 7))
    ] == expected
    assert expected == [b"456", b"0\r", b"56", b""]
    os.close(descriptor)


@pytest.mark.parametrize("binary", [None, 0x8000])
def test_the_flags_that_a_system_lacks_are_left_out(tmp_path, monkeypatch, binary):
    flags = []
    monkeypatch.delattr(os, "O_NONBLOCK", raising=False)
    monkeypatch.delattr(os, "O_BINARY", raising=False)
    if binary:
        monkeypatch.setattr(os, "O_BINARY", binary, raising=False)
    monkeypatch.setattr(os, "open", lambda path, given: flags.append(given) or 7)
    assert portable.open_descriptor(tmp_path / "a") == 7
    assert flags == [os.O_RDONLY | (binary or 0)]


class Limits:
    """resource, of a system that takes no more open files than ``most``."""

    RLIMIT_NOFILE = 7

    def __init__(self, soft, hard, most):
        self.now = (soft, hard)
        self.most = most

    def getrlimit(self, which):
        return self.now

    def setrlimit(self, which, limits):
        if limits[0] > self.most:
            raise ValueError("current limit exceeds maximum limit")
        self.now = limits


@pytest.mark.parametrize(
    ("system", "limits", "soft"),
    [
        ("Linux", Limits(1024, 524288, 524288), 524288),
        ("macOS", Limits(256, 2**63 - 1, 10240), 10240),
        ("macOS, raised before", Limits(20000, 2**63 - 1, 20000), 20000),
        ("a sandbox", Limits(64, 2**20, 64), 64),
        ("Windows", None, None),
    ],
)
def test_as_many_open_files_as_the_system_takes(monkeypatch, system, limits, soft):
    monkeypatch.setattr(portable, "resource", limits)
    portable.allow_many_open_files()
    assert limits is None or limits.now[0] == soft


def test_a_command_in_a_thread_leaves_signals_alone(data_dir):
    codes = []
    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(
        target=lambda: codes.append(main(["check", "--train_data_dir", str(data_dir / "absent")]))
    )
    thread.start()
    thread.join()
    assert codes == [2]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_ends_a_process_is_heard_where_it_exists():
    assert signals.HEARD[:2] == (signal.SIGINT, signal.SIGTERM)
    assert (len(signals.HEARD) == 3) == (sys.platform == "win32")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_no_error(monkeypatch, tmp_path, number):
    def refuse(descriptor):
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_atomically(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
