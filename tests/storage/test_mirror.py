"""The mirror: what it calls safe is there, and whatever its drive does, training does not notice."""

import shutil
import threading
import time

import pytest

from benchmarks.faults.drive_campaign import Campaign
from benchmarks.faults.fake_drive import CALM
from benchmarks.faults.mirrored_run import IDENTITY, Place, files_of, quick, wait_for
from lora_utils.storage import mirror, mirror_copy
from lora_utils.storage.mirror import Mirror
from lora_utils.storage.mirror_folder import MirrorError
from lora_utils.storage.mirror_restore import restore
from lora_utils.system.files import commit_folder, read_folder


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    with quick(), place.drive:
        yield place


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_on_bad_days_of_a_drive_nothing_false_is_restored_or_called_safe(tmp_path, seed):
    campaign = Campaign(tmp_path, seed)
    campaign.play(20)
    assert campaign.wrong == []
    assert campaign.counts["restored"] > 3
    assert sum(count for name, count in campaign.counts.items() if name.startswith("fault")) > 30


@pytest.mark.parametrize("kind", ["fail_at", "cut_at"])
def test_an_error_or_a_lost_machine_at_any_operation_costs_no_step_that_was_safe(tmp_path, kind):
    number, reached = 1, True
    while reached:
        place = Place(tmp_path / str(number))
        with quick(), place.drive:
            follower = place.mirror()
            follower.offer(place.commit(1))
            wait_for(lambda follower=follower: not follower._pending)
            setattr(place.drive, kind, place.drive.count + number)
            follower.offer(place.commit(2))
            problem = follower.close(20)
            follower._thread.join(20)
            reached = place.drive.count >= getattr(place.drive, kind)
            assert problem or follower.safe_step == 2
            assert not problem or kind == "cut_at"
            shutil.rmtree(place.output)
            place.drive.mount_elsewhere()
            place.drive.cut_at = 0
            found = restore(place.mirror_dir, place.output, place.cache)
            assert found.step >= follower.safe_step
            assert read_folder(place.output / "checkpoints" / f"step-{found.step:09d}") == files_of(
                found.step
            )
        number += 1
    assert number > 30


def test_a_checkpoint_is_safe_once_it_reads_back_and_two_are_kept(place):
    follower = place.mirror()
    assert follower.safe_step is None
    for step in (1, 2, 3):
        follower.offer(place.commit(step))
        wait_for(lambda step=step: follower.safe_step == step)
    assert follower.close(10) is None
    assert place.steps() == [3, 2]
    assert read_folder(place.copies / "step-000000003") == files_of(3)
    assert [path.name for path in place.copies.iterdir() if path.name.startswith(".")] == []


def test_while_a_drive_is_away_training_goes_on_and_is_told_once(place, caplog):
    follower = place.mirror()
    assert "is on the disk of output_dir" in caplog.text
    caplog.clear()
    place.drive.connected = False
    for step in range(1, 6):
        started = time.monotonic()
        follower.offer(place.commit(step))
        assert time.monotonic() - started < 0.5
    wait_for(lambda: place.drive.faults["disconnected"] > 40)
    assert len(caplog.records) == 1
    assert "Transport endpoint is not connected, at " in caplog.text
    place.drive.connected = True
    wait_for(lambda: follower.safe_step == 5)
    assert follower.close(10) is None
    assert place.steps() == [5]  # those before it were skipped
    assert [record.getMessage().split()[-2:] for record in caplog.records[1:]] == [["works", "again"]]


def test_the_end_of_a_run_says_what_is_not_safe_and_why(place):
    follower = place.mirror()
    follower.offer(place.commit(1))
    wait_for(lambda: follower.safe_step == 1)
    place.drive.connected = False
    weights = place.output / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"weights")
    follower.offer(place.commit(2))
    follower.offer_file(weights)
    sentence = follower.close(0.2)
    for part in (
        "may lack step-000000002 and pytorch_lora",
        "Transport endpoint",
        "verified there: step 1",
        "yourself",
    ):
        assert part in sentence


def test_a_drive_that_hangs_holds_up_nobody(place, monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr(mirror, "is_copy", lambda *_: hang.wait(30))
    follower = place.mirror()
    follower.offer(place.commit(1))
    started = time.monotonic()
    assert "there was not enough time" in follower.close(0.1)
    assert time.monotonic() - started < 5
    hang.set()


def test_what_the_drive_loses_before_the_end_is_copied_again(place):
    follower = place.mirror()
    follower.offer(place.commit(1))
    wait_for(lambda: follower.safe_step == 1)
    (place.copies / "step-000000001" / "state.json").write_bytes(b"")
    assert follower.close(10) is None
    assert read_folder(place.copies / "step-000000001") == files_of(1)


def test_a_name_that_is_whole_is_only_given_to_what_was_verified(place):
    source = place.commit(1)
    place.copies.mkdir(parents=True)
    earlier = place.copies / source.name
    commit_folder(earlier, files_of(9))
    place.drive.rates = CALM | {"cut": 1.0}
    with pytest.raises(OSError, match="does not read back"):
        mirror_copy.copy_folder(source, earlier)
    assert read_folder(earlier) == files_of(9)
    place.drive.rates = CALM
    mirror_copy.copy_folder(source, earlier)
    assert read_folder(earlier) == files_of(1)


def test_weights_are_copied_and_replaced(place):
    follower = place.mirror()
    weights = place.output / "weights.safetensors"
    place.output.mkdir()
    for content in (b"first", b"second"):
        weights.write_bytes(content)
        follower.offer_file(weights)
        wait_for(lambda: not follower._pending)
        assert (place.mirror_dir / "run" / weights.name).read_bytes() == content
    assert follower.close(10) is None


def test_a_checkpoint_that_is_damaged_or_gone_here_is_not_mirrored(place, caplog):
    follower = place.mirror()
    damaged, gone = place.commit(1), place.output / "checkpoints" / "step-000000002"
    (damaged / "state.json").write_bytes(b"other")
    follower.offer(damaged)
    wait_for(lambda: "state.json has 5 bytes" in caplog.text)
    follower.offer(gone)
    assert "is gone" in follower.close(10)
    assert not place.copies.exists() or place.steps() == []


def test_the_copies_of_an_earlier_run_are_kept_under_another_name(place, caplog):
    for step in (500, 400):
        commit_folder(place.copies / f"step-{step:09d}", files_of(7))
    follower = place.mirror()
    follower.begin("anew", 0)
    follower.offer(place.commit(10))
    assert follower.close(10) is None
    assert place.steps() == [10]
    aside = place.mirror_dir / "run" / "earlier-1"
    assert {path.name for path in (aside / "checkpoints").iterdir()} == {"step-000000400", "step-000000500"}
    assert f"the mirror held an earlier start of this run; that is in {aside} now" in caplog.text


def test_a_drive_that_was_unmounted_is_not_built_on_the_local_disk(place):
    follower = place.mirror()
    shutil.rmtree(place.mirror_dir)
    follower.offer(place.commit(1))
    assert "No such file" in follower.close(0.2)
    assert not place.mirror_dir.exists()
    with pytest.raises(MirrorError, match=r"drive\.mount"):
        Mirror(place.mirror_dir / "deeper" / "still", place.output, place.cache, IDENTITY)


def test_a_mount_point_that_is_left_empty_is_not_taken_for_the_drive(place, monkeypatch):
    monkeypatch.setattr(mirror, "same_disk", lambda *_: False)
    follower = place.mirror()
    monkeypatch.setattr(mirror, "same_disk", lambda *_: True)
    follower.offer(place.commit(1))
    assert "not connected" in follower.close(0.2)
    assert list(place.mirror_dir.iterdir()) == []
