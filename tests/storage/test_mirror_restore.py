"""Restoring: the newest whole copy, each damaged one by name, and never a silent start from nothing."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.faults.fake_drive import PowerCut
from benchmarks.faults.mirrored_run import Place, files_of, quick
from benchmarks.faults.small_cache import all_sound, encode
from lora_utils.precompute.cache import FEW_PACKS
from lora_utils.storage import mirror_copy
from lora_utils.storage.mirror_folder import MirrorError, packs_in
from lora_utils.storage.mirror_restore import Restored, restore
from lora_utils.system.files import commit_folder, read_folder


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    with quick(), place.drive:
        yield place


def bring_back(place):
    return restore(place.mirror_dir, place.output, place.cache)


def fill(place, *steps):
    for step in steps:
        commit_folder(place.copies / f"step-{step:09d}", files_of(step))


def mirrored_cache(place, count):
    for number in range(count):
        encode(place.cache, number)
    (place.cache / "index.jsonl").write_bytes(b'{"schema": 2, "examples": 0}\n')
    follower = place.mirror()
    follower.offer_cache()
    assert follower.close(20) is None
    return place.mirror_dir / "run" / "precomputed"


def test_an_empty_mirror_restores_nothing_and_is_made_where_its_parent_is(place):
    assert bring_back(place) is None
    assert place.mirror_dir.is_dir()


def test_a_mirror_that_is_not_mounted_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(
        MirrorError, match=r"absent/lora does not exist; mount Google Drive first \(from google.colab"
    ):
        restore(tmp_path / "absent" / "lora", tmp_path / "run", tmp_path / "cache")


def test_a_run_that_has_checkpoints_is_left_alone(place):
    fill(place, 5)
    place.commit(3)
    assert bring_back(place) is None
    assert [path.name for path in (place.output / "checkpoints").iterdir()] == ["step-000000003"]


def test_the_newest_whole_copy_comes_back_and_damaged_ones_are_named_and_kept(place):
    fill(place, 1, 2, 3, 4)
    (place.copies / "step-000000004" / "adapter.safetensors").unlink()
    (place.copies / "step-000000003" / "state.json").write_bytes(b"short")
    shutil.copytree(place.copies / "step-000000001", place.copies / "step-000000009 (1)")
    shutil.copytree(place.copies / "step-000000001", place.copies / ".partial-step-000000008-0")
    found = bring_back(place)
    assert (found.step, found.packs) == (2, 0)
    assert "step-000000004 in the mirror is not whole: adapter.safetensors is missing" in found.skipped
    assert found.skipped[1].startswith("step-000000003 in the mirror is not whole: state.json has 5 bytes")
    assert [path.name for path in (place.output / "checkpoints").iterdir()] == ["step-000000002"]
    assert read_folder(place.output / "checkpoints" / "step-000000002") == files_of(2)
    assert len(list(place.copies.iterdir())) == 6


def test_when_no_copy_is_whole_the_user_decides(place):
    fill(place, 1)
    (place.copies / "step-000000001" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(MirrorError, match=r"manifest.json is damaged.*to start anew, rename"):
        bring_back(place)
    assert (place.copies / "step-000000001").is_dir()


def test_a_drive_that_is_away_is_never_taken_for_an_empty_one(place):
    fill(place, 1)
    place.drive.connected = False
    with pytest.raises(
        MirrorError, match=r"cannot be read \(Transport endpoint is not connected\).*force_remount"
    ):
        bring_back(place)
    assert not place.output.exists()
    place.drive.connected = True
    assert bring_back(place).step == 1


def test_a_copy_that_stays_unreadable_is_not_passed_over_for_an_older_one(place, monkeypatch):
    fill(place, 1, 2)
    monkeypatch.setattr(Path, "open", lambda path, *_: fail(path) if path.parent.name[-1] == "2" else None)
    with pytest.raises(MirrorError, match=r"step-000000002 cannot be read \(Input/output error\)"):
        bring_back(place)
    assert not (place.output / "checkpoints").exists()


def fail(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_an_error_at_any_operation_is_tried_again(tmp_path):
    number, reached = 1, True
    while reached:
        place = Place(tmp_path / str(number))
        fill(place, 1, 2)
        with quick(), place.drive:
            place.drive.fail_at = number
            assert bring_back(place) == Restored(2, 0, ())
            reached = place.drive.count >= number
        number += 1
    assert number > 10


def test_a_machine_that_is_lost_while_it_restores_restores_all_of_it_the_next_time(tmp_path):
    number, reached = 1, True
    while reached:
        place = Place(tmp_path / str(number))
        with quick(), place.drive:
            mirrored_cache(place, 2)
            shutil.rmtree(place.cache)
            fill(place, 1, 2)
            place.drive.cut_at = place.drive.count + number
            with suppress(PowerCut):
                bring_back(place)
            reached, place.drive.power, place.drive.cut_at = not place.drive.power, True, 0
            assert not reached or bring_back(place).step == 2
            assert read_folder(place.output / "checkpoints" / "step-000000002") == files_of(2)
            assert len(packs_in(place.cache)) == 2
        number += 1
    assert number > 20


def test_files_that_become_visible_late_are_waited_for(place):
    fill(place, 1, 2)
    for name in ("adapter.safetensors", "state.json"):
        place.drive.delay(place.copies / "step-000000002" / name, asked=6)
    assert bring_back(place) == Restored(2, 0, ())


def test_the_cache_comes_back_before_there_is_a_checkpoint(place):
    mirrored_cache(place, 3)
    shutil.rmtree(place.cache)
    assert bring_back(place) == Restored(None, 3, ())
    assert all_sound(place.cache)
    assert (place.cache / "index.jsonl").is_file()
    assert bring_back(place) is None


def test_packs_are_copied_once_and_follow_the_cache_when_it_joins_them(place):
    mirrored = mirrored_cache(place, FEW_PACKS)
    before = {path.name: path.stat().st_ino for path in mirrored.iterdir()}
    follower = place.mirror()
    follower.offer_cache()
    assert follower.close(20) is None
    assert {path.name: path.stat().st_ino for path in mirrored.iterdir()} == before
    encode(place.cache, FEW_PACKS, join=True)
    follower = place.mirror()
    follower.offer_cache()
    assert follower.close(20) is None
    assert packs_in(mirrored) == packs_in(place.cache)
    assert len(packs_in(mirrored)) == 1
    assert all_sound(mirrored)


def test_old_packs_stay_in_the_mirror_until_the_joint_one_is_there(place, monkeypatch):
    mirrored = mirrored_cache(place, FEW_PACKS)
    old = packs_in(mirrored)
    encode(place.cache, FEW_PACKS, join=True)
    monkeypatch.setattr(mirror_copy, "RESERVED_BYTES", 2**60)
    follower = place.mirror()
    follower.offer(place.commit(1))
    assert "the cache" in follower.close(0.3)
    assert packs_in(mirrored) == old
    assert follower.safe_step == 1  # the cache leaves space to checkpoints


def test_a_cache_that_is_gone_here_stays_in_the_mirror(place):
    mirrored = mirrored_cache(place, 2)
    shutil.rmtree(place.cache)
    follower = place.mirror()
    follower.offer_cache()
    assert follower.close(20) is None
    assert len(packs_in(mirrored)) == 2


def test_a_pack_that_the_drive_cuts_is_copied_again(place):
    place.drive.rates["cut"] = 0.7
    mirrored = mirrored_cache(place, 6)
    assert all_sound(mirrored)
    assert place.drive.faults["cut"] > 2
    for name in packs_in(mirrored):
        assert (mirrored / name).read_bytes() == (place.cache / name).read_bytes()


def test_a_damaged_pack_is_left_out_by_name(place):
    mirrored = mirrored_cache(place, 3)
    first, second, _ = sorted(packs_in(mirrored))
    content = bytearray((mirrored / first).read_bytes())
    content[-1] ^= 1
    (mirrored / first).write_bytes(content)
    (mirrored / second).write_bytes(content[:100])
    shutil.rmtree(place.cache)
    found = bring_back(place)
    assert found.packs == 1
    assert found.skipped[0].startswith(f"{first} in the mirror is left out")
    assert found.skipped[0].endswith("1 of 1 records are damaged")
    assert found.skipped[1].endswith("cut short or damaged")
    assert all_sound(place.cache)
