"""Runs that share a mirror: nothing that a run did not write is replaced, nothing of another comes back."""

import copy
import json
import re
import shutil
from itertools import product

import pytest

from benchmarks.faults.mirrored_run import IDENTITY, RETRY_SECONDS, files_of, quick, wait_for
from benchmarks.faults.small_cache import all_sound, encode
from lora_utils.model import lora
from lora_utils.storage.mirror import Mirror
from lora_utils.storage.mirror_folder import MirrorError, packs_in
from lora_utils.storage.mirror_note import NOTE, OWNER, look_at
from lora_utils.storage.mirror_restore import Restored, restore
from lora_utils.system.files import commit_folder, read_folder

LORA = lora.WEIGHTS_NAME
FOREIGN = {
    "notes.txt": b"mine",
    "other_style.safetensors": b"mine too",
    "checkpoints/step-000000003 (1)/adapter.safetensors": b"of a drive",
    "checkpoints/backup of step 3/x": b"x",
    "precomputed/readme": b"x",
}


def changed(part="fixed", **settings):
    identity = copy.deepcopy(IDENTITY)
    identity[part] |= settings
    return identity


class Machine:
    """One with a run folder and a cache, both empty at first."""

    def __init__(self, folder, name="model"):
        self.mirror_dir = folder.parent / "drive"
        self.mirror_dir.mkdir(exist_ok=True)
        self.output = folder / name
        self.cache = folder / "cache"

    def restore(self, identity=IDENTITY):
        with quick():
            return restore(self.mirror_dir, self.output, self.cache, identity)

    def mirror(self, identity=IDENTITY):
        with quick():
            return Mirror(self.mirror_dir, self.output, self.cache, identity, retry_seconds=RETRY_SECONDS)

    def train(self, *steps, identity=IDENTITY, start="first", begins=0, weights=b"weights"):
        """Mirror these steps, the cache, and a LoRA where there is one; returns the mirror's folder."""
        follower = self.mirror(identity)
        follower.begin(start, begins)
        with quick():
            for step in steps:
                folder = self.output / "checkpoints" / f"step-{step:09d}"
                commit_folder(folder, files_of(step, identity, start))
                follower.offer(folder)
                wait_for(lambda step=step: follower.safe_step == step)
            if weights:
                self.output.mkdir(parents=True, exist_ok=True)
                (self.output / LORA).write_bytes(weights)
                follower.offer_file(self.output / LORA)
            assert follower.close(20) is None
        assert not (follower.folder / OWNER).exists()
        return follower.folder

    def steps(self):
        return sorted(int(path.name[5:]) for path in (self.output / "checkpoints").glob("step-*"))


@pytest.fixture
def machines(tmp_path):
    names = iter("abcdefgh")
    return lambda name="model": Machine(tmp_path / next(names), name)


def tree(folder, but=()):
    """All files below a folder, by relative name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in but}


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def as_by_an_earlier_version(run):
    """Without notes, with the optimiser's class in the checkpoints."""
    (run / NOTE).unlink()
    for folder in list((run / "checkpoints").glob("step-" + "[0-9]" * 9)):
        files = read_folder(folder)
        state = json.loads(files["state.json"])
        state["about"]["fingerprint"]["fixed"]["optimizer"] = "AdamW"
        del state["about"]["start"]
        shutil.rmtree(folder)
        commit_folder(folder, files | {"state.json": json.dumps(state).encode()})


OTHERS = {
    "rank": (changed(rank=8), "rank was 16, is 8"),
    "data": (changed(data="e" * 32), "data is other now"),
    "base": (changed(base="c" * 32), "base is other now"),
    "seed": (changed(seed=1), "seed was 0, is 1"),
}


PROJECTS = [("rank", *choice) for choice in product(["none", "latest"], *[[True, False]] * 3)]
PROJECTS += [(other, "latest", True, False, True) for other in OTHERS if other != "rank"]


@pytest.mark.parametrize(("other", "resume", "has_lora", "is_early", "has_foreign"), PROJECTS)
def test_two_projects_of_one_name_never_meet(
    machines, caplog, resume, has_lora, is_early, has_foreign, other
):
    identity, difference = OTHERS[other]
    first = machines()
    run = first.train(2, 3, 5, weights=b"first" if has_lora else None)
    if is_early:
        as_by_an_earlier_version(run)
    put(run, FOREIGN if has_foreign else {})
    before = tree(run)

    second = machines()
    if resume == "latest":
        restored = second.restore(identity)
        assert (restored.step, restored.packs) == (None, 0)
        assert f"{run} holds another run ({difference}): " in restored.skipped[0]
    beside = second.train(1, 3, 5, identity=identity, start="second", weights=b"second")
    assert beside == run.with_name("model-2")
    assert f"this run is mirrored into {beside}: model holds another run ({difference})" in caplog.text
    assert tree(run) == before

    # Each gets its own back, on machines that have neither.
    for wanted, expected, start in ((IDENTITY, {"first", None}, run), (identity, {"second"}, beside)):
        third = machines()
        assert third.restore(wanted).step == 5
        assert third.steps() == [5]
        files = read_folder(third.output / "checkpoints" / "step-000000005")
        assert json.loads(files["state.json"])["about"].get("start") in expected
        assert third.mirror(wanted).folder == start


@pytest.mark.parametrize(("has_lora", "is_early", "has_foreign"), product([True, False], repeat=3))
def test_a_run_that_starts_anew_sets_its_earlier_start_aside(
    machines, caplog, has_lora, is_early, has_foreign
):
    run = machines().train(2, 3, 5, weights=b"first" if has_lora else None)
    if is_early:
        as_by_an_earlier_version(run)
    put(run, FOREIGN if has_foreign else {})
    before = tree(run, but=(NOTE,))
    assert machines().train(1, 3, start="again", weights=b"second") == run

    parts = re.compile(rf"checkpoints/step-00000000\d/(adapter|manifest|state)\.\w+|{LORA}")
    ours = {name: content for name, content in before.items() if parts.fullmatch(name)}
    assert len(ours) == 6 + has_lora
    assert tree(run / "earlier-1") == ours
    after = tree(run)
    for name in before.keys() - ours.keys():
        assert after[name] == before[name]
    assert after[LORA] == b"second"
    assert f"the mirror held an earlier start of this run; that is in {run / 'earlier-1'} now" in caplog.text
    third = machines()
    assert third.restore().step == 3
    assert look_at(run).start == "again"

    machines().train(4, start="once more", weights=None)
    assert (run / "earlier-2" / LORA).read_bytes() == b"second"
    assert tree(run / "earlier-1") == ours


@pytest.mark.parametrize("is_early", [True, False], ids=["earlier version", "noted"])
def test_a_run_that_goes_on_replaces_what_is_its_own(machines, is_early):
    run = machines().train(2, 3, weights=b"half")
    if is_early:
        as_by_an_earlier_version(run)
    second = machines()
    assert second.restore().step == 3
    start = None if is_early else "first"
    assert second.train(5, 8, start=start, begins=3, weights=b"whole") == run
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", LORA, NOTE]
    assert (run / LORA).read_bytes() == b"whole"
    assert json.loads((run / NOTE).read_bytes())["start"] == start


def test_a_run_that_goes_back_sets_later_steps_aside_and_the_lora_that_was_made_of_them(machines, caplog):
    run = machines().train(2, 3, 5, weights=b"of step 5")
    second = machines()
    commit_folder(second.output / "checkpoints" / "step-000000003", files_of(3, IDENTITY, "first"))
    assert second.train(4, begins=3, weights=None) == run
    assert "the mirror held later steps than 3, from which it goes on" in caplog.text
    assert (run / "earlier-1" / LORA).read_bytes() == b"of step 5"
    assert [path.name for path in (run / "earlier-1" / "checkpoints").iterdir()] == ["step-000000005"]
    assert not (run / LORA).exists()


@pytest.mark.parametrize(
    ("setting", "value", "step", "is_same"),
    [
        ("learning_rate", 2e-4, 999_999, True),  # while steps are left, another rate goes on
        ("learning_rate", 2e-4, 10**6, False),
        ("steps", 10**7, 10**6, True),
        ("steps", 10**5, 10**6, False),
        ("device", "cuda", 10**6, True),
        ("learning_rate", 1e-4, 10**6, True),
    ],
)
def test_what_may_change_makes_another_run_where_nothing_is_left_to_train(
    machines, setting, value, step, is_same
):
    run = machines().train(step, weights=b"first")
    before = tree(run)
    wanted = changed("free", **{setting: value})
    second = machines()
    restored = second.restore(wanted)
    assert restored.step == (step if is_same else None)
    assert (second.mirror(wanted).folder == run) is is_same
    if not is_same:
        second.train(7, identity=wanted, start="second")
        assert tree(run) == before
        assert machines().restore(wanted).step == 7


def test_a_cache_of_equal_data_comes_from_another_run_and_of_other_data_does_not(machines):
    first = machines()
    for number in range(3):
        encode(first.cache, number)
    first.train(1)
    second = machines()
    restored = second.restore(changed(rank=8))
    assert restored.packs == 3
    assert "only its cache, of the same data, is taken from it" in restored.skipped[0]
    assert all_sound(second.cache)
    assert machines().restore(changed(data="e" * 32)).packs == 0


def test_records_that_a_smaller_cache_lacks_stay_in_the_mirror(machines):
    first = machines()
    for number in range(3):
        encode(first.cache, number)
    run = first.train(1)
    before = packs_in(run / "precomputed")
    second = machines()
    encode(second.cache, 0)
    second.train(1, start="again")
    assert packs_in(run / "precomputed") >= before - {min(before)}
    third = machines()
    third.restore()
    assert all_sound(third.cache)
    assert len(packs_in(third.cache)) == 3


@pytest.mark.parametrize("content", [{}, {"notes.txt": b"mine"}, {"precomputed/readme": b"x"}])
def test_a_folder_of_the_name_that_holds_no_run_is_used_and_what_is_in_it_stays(machines, content):
    machine = machines()
    run = machine.mirror_dir / "model"
    run.mkdir()
    put(run, content)
    assert machine.restore() is None
    assert machine.train(1) == run
    assert content.items() <= tree(run).items()


@pytest.mark.parametrize(
    ("content", "told"),
    [({LORA: b"whose?"}, "a LoRA of unknown origin"), (b"a file", "a file of unknown origin")],
)
def test_what_is_nobodys_is_left_alone(machines, caplog, content, told):
    machine = machines()
    run = machine.mirror_dir / "model"
    if isinstance(content, bytes):
        run.write_bytes(content)
    else:
        run.mkdir()
        put(run, content)
    assert told in machine.restore().skipped[0]
    assert machine.train(1) == machine.mirror_dir / "model-2"
    assert told in caplog.text
    assert (run.read_bytes() if run.is_file() else tree(run)) == content


def test_checkpoints_that_are_all_damaged_may_be_this_runs(machines):
    run = machines().train(1, 2)
    (run / NOTE).write_bytes(b"\x00")
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_bytes(b"")
    second = machines()
    with pytest.raises(MirrorError, match=r"may be this run's or another's; .*to start anew, rename"):
        second.restore()
    assert second.train(4) == run.with_name("model-2")  # none was asked for
    assert machines().restore().step == 4


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"schema": 9}', b'{"schema": 1, "fixed": 3}', b"\xff" * 99]
)
def test_a_note_that_is_damaged_is_told_by_the_checkpoints_and_written_anew(machines, damage):
    run = machines().train(1, 2)
    (run / NOTE).write_bytes(damage)
    assert machines().restore(changed(rank=8)).step is None
    second = machines()
    assert second.restore().step == 2
    assert second.train(3, begins=2) == run
    assert look_at(run).has_note
    assert look_at(run).start == "first"
    assert not (run / "earlier-1").exists()


def test_names_and_numbers(machines):
    for number in range(4):
        machines().train(1, identity=changed(seed=number))
    assert sorted(path.name for path in machines().mirror_dir.iterdir()) == [
        "model",
        "model-2",
        "model-3",
        "model-4",
    ]
    assert machines().mirror(changed(seed=2)).folder.name == "model-3"
    assert machines("model-2").mirror(changed(seed=0)).folder.name == "model-2-2"
    assert machines("elsewhere").restore() is None


def test_a_run_of_a_sweep_is_not_taken_for_a_numbered_folder(machines, caplog):
    """Runs that differ in their rate alone, called sweep, sweep-2, sweep-3 by the user."""
    drive = machines().mirror_dir
    for name in ("sweep-2", "sweep-3"):
        machine = machines(name)
        assert machine.restore(changed("free", learning_rate=float(name[-1]))) is None
        assert machine.train(1, weights=None) == drive / name
    machines("sweep").train(1, identity=changed(rank=8))
    other = machines("sweep")
    assert other.restore().step is None
    assert other.train(2) == drive / "sweep-4"
    assert "sweep-2 holds another run (it is called sweep-2)" in caplog.text
    assert machines("sweep").restore().step == 2
    assert machines("sweep-3").restore().step == 1


def test_a_process_that_comes_later_takes_over_at_once_and_the_first_stops(machines, caplog):
    first = machines()
    follower = first.mirror()
    follower.begin("first", 0)
    with quick():
        commit_folder(first.output / "checkpoints" / "step-000000001", files_of(1, IDENTITY, "first"))
        follower.offer(first.output / "checkpoints" / "step-000000001")
        wait_for(lambda: follower.safe_step == 1)
        note = json.loads((follower.folder / OWNER).read_bytes())
        (follower.folder / OWNER).write_text(
            json.dumps(note | {"pid": 7, "host": "gone"})
        )  # a lost machine's

        second = machines()
        assert second.restore().step == 1
        successor = second.mirror()
        successor.begin("first", 1)
        commit_folder(second.output / "checkpoints" / "step-000000002", files_of(2, IDENTITY, "first"))
        successor.offer(second.output / "checkpoints" / "step-000000002")
        wait_for(lambda: successor.safe_step == 2)
        assert "(pid 7 on gone, since" in caplog.text
        assert "if it still runs, it stops that" in caplog.text

        before = tree(follower.folder)
        commit_folder(first.output / "checkpoints" / "step-000000009", files_of(9, IDENTITY, "first"))
        follower.offer(first.output / "checkpoints" / "step-000000009")
        wait_for(lambda: not follower._thread.is_alive())
        follower.offer_cache()
        assert "writes there now; verified there: step 1); copy" in follower.close(1)
        assert tree(follower.folder) == before
        told = [text for text in caplog.messages if "this process mirrors nothing more into" in text]
        assert len(told) == 1
        assert successor.close(10) is None
    assert machines().restore() == Restored(2, 0, ())


@pytest.mark.parametrize("damage", [None, b"", b"{", b"3"])
def test_an_owners_name_that_the_drive_loses_is_written_again(machines, damage):
    machine = machines()
    follower = machine.mirror()
    follower.begin("first", 0)
    with quick():
        for step in (1, 2):
            commit_folder(machine.output / "checkpoints" / f"step-00000000{step}", files_of(step))
            follower.offer(machine.output / "checkpoints" / f"step-00000000{step}")
            wait_for(lambda step=step: follower.safe_step == step)
            if step == 1 and damage is None:
                (follower.folder / OWNER).unlink()
            elif step == 1:
                (follower.folder / OWNER).write_bytes(damage)
        assert json.loads((follower.folder / OWNER).read_bytes())["id"]
        assert follower.close(10) is None
