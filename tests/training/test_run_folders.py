"""A changed run goes on, goes beside, or is refused; what stands beside weights describes them."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.storage.checkpoint import CheckpointError
from lora_utils.system.ownership import InUseError
from lora_utils.training.folders import completed_run, find_run
from lora_utils.training.start import plan_run
from tests.conftest import ROOT, TINY

WEIGHTS = "pytorch_lora_weights.safetensors"
RUN = "pictures-mine"
STEPS = 3
GOES_ON, BESIDE, COMPLETE = "goes on", "beside", "complete"
# What changes: what becomes of a run that is complete, of one that was interrupted, and what is said.
CHANGES = {
    "nothing": ({}, COMPLETE, GOES_ON, ""),
    "the rate": ({"learning_rate": 2e-3}, BESIDE, GOES_ON, "learning_rate was 0.001, is 0.002"),
    "more steps": ({"max_train_steps": 5}, GOES_ON, GOES_ON, "steps was 3, is 5"),
    "fewer steps": ({"max_train_steps": 1}, BESIDE, BESIDE, "of 3 steps behind it, and 1 in all are asked"),
    "the rank": ({"rank": 4}, BESIDE, BESIDE, "rank was 16, is 4"),
    "the seed": ({"seed": 7}, BESIDE, BESIDE, "seed was 0, is 7"),
    "a picture more": ("picture", BESIDE, BESIDE, "1 new (new.png)"),
    "a caption": ("caption", BESIDE, BESIDE, "1 with another caption (ink_0"),
    "the base": ("base", BESIDE, BESIDE, "base is other now"),
}


@pytest.fixture(scope="module")
def places(data_dir, precompute_dir, tmp_path_factory):
    """Two folders to copy, each with pictures, a base and a run: a complete one, and one of two steps."""
    made = {}
    for state in ("complete", "interrupted"):
        folder = tmp_path_factory.mktemp(state)
        shutil.copytree(data_dir, folder / "pictures")
        ignored = shutil.ignore_patterns("*.py", "__pycache__", "*.png")
        shutil.copytree(TINY, folder / "base", ignore=ignored)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            run = stages.train(settings_in(folder, precompute_dir, {}))
            for report in run:
                if state == "interrupted" and report.step == 2:
                    run.close()
        made[state] = folder
    return made


def settings_of(precompute_dir):
    return {
        "pretrained_model_name_or_path": "base",
        "train_data_dir": "pictures",
        "precompute_dir": precompute_dir,
        "resolution": 64,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_train_steps": STEPS,
        "resume_from_checkpoint": "latest",
        "run_name": RUN,
    }


def settings_in(folder, precompute_dir, changed):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return load_config(None, settings_of(precompute_dir) | changed)


def change(folder, what):
    """Carry out what a setting cannot say; returns the settings that can."""
    if isinstance(what, dict):
        return what
    if what == "picture":
        shutil.copy(next((folder / "pictures").glob("*.png")), folder / "pictures" / "new.png")
        (folder / "pictures" / "new.txt").write_text("a new picture")
    if what == "caption":
        next((folder / "pictures").glob("*.txt")).write_text("another caption")
    if what == "base":
        file = next((folder / "base" / "unet").glob("*.safetensors"))
        weights = load_file(file)
        weights["conv_in.bias"] += 0.01
        save_file(weights, file)
    return {}


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_describes_its_weights(folder):
    config = load_config(folder / "config.yaml")
    summary = json.loads((folder / "summary.json").read_text())
    with safe_open(folder / WEIGHTS, "pt") as file:
        ranks = {file.get_slice(name).get_shape()[0] for name in file.keys() if "lora.down" in name}  # noqa: SIM118
    assert ranks == {config.lora.rank} == {summary["rank"]}
    rates = [json.loads(line).get("learning_rate") for line in (folder / "metrics.jsonl").open()]
    assert rates[-1] == config.train.learning_rate
    assert summary["steps"] == config.train.max_train_steps


@pytest.mark.parametrize("is_given", [True, False], ids=["output_dir", "no output_dir"])
@pytest.mark.parametrize("state", ["complete", "interrupted"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_run_has_a_sentence_and_a_folder(
    places, precompute_dir, tmp_path, monkeypatch, caplog, name, state, is_given
):
    what, when_complete, when_interrupted, sentence = CHANGES[name]
    outcome = when_complete if state == "complete" else when_interrupted
    shutil.copytree(places[state], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "here" / "runs" / RUN
    changed = change(tmp_path / "here", what) | ({"output_dir": f"runs/{RUN}"} if is_given else {})
    config = settings_in(tmp_path / "here", precompute_dir, changed)
    before = contents(folder)

    if outcome == BESIDE and is_given:
        with pytest.raises(CheckpointError) as told:
            list(stages.train(config))
        assert sentence in str(told.value)
        assert f"{RUN}-2" in str(told.value)
        assert "resume_from_checkpoint=none" in str(told.value)
        assert contents(folder) == before
        return

    steps = [report.step for report in stages.train(config)]
    assert sentence in caplog.text
    if outcome == COMPLETE:
        assert steps == []
        assert "is complete" in caplog.text
        assert contents(folder) == before
    elif outcome == BESIDE:
        assert steps == list(range(1, config.train.max_train_steps + 1))
        assert contents(folder) == before
        folder = folder.with_name(f"{RUN}-2")
    else:
        assert steps == list(range(4 if state == "complete" else 3, config.train.max_train_steps + 1))
    assert find_run(config).resolve() == folder
    assert_describes_its_weights(folder)


def test_a_complete_run_stays_complete_when_going_on_was_killed_at_once(
    places, precompute_dir, tmp_path, monkeypatch, caplog
):
    shutil.copytree(places["complete"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for changed in ({"max_train_steps": 5}, {"max_train_steps": 5, "learning_rate": 2e-3}):
        plan_run(settings_in(tmp_path / "here", precompute_dir, changed))  # and no step
    assert list(stages.train(settings_in(tmp_path / "here", precompute_dir, {}))) == []
    assert "is complete" in caplog.text
    longer = settings_in(tmp_path / "here", precompute_dir, {"max_train_steps": 4})
    assert [report.step for report in stages.train(longer)] == [4]
    assert_describes_its_weights(tmp_path / "here" / "runs" / RUN)
    assert list(stages.train(longer)) == []


def test_settings_that_were_tried_before_find_their_run_again(places, precompute_dir, tmp_path, monkeypatch):
    shutil.copytree(places["complete"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for rank, name in ((4, f"{RUN}-2"), (8, f"{RUN}-3"), (4, f"{RUN}-2"), (16, RUN)):
        config = settings_in(tmp_path / "here", precompute_dir, {"rank": rank})
        list(stages.train(config))
        assert find_run(config).name == name
    assert sorted(path.name for path in (tmp_path / "here" / "runs").iterdir()) == [
        RUN, f"{RUN}-2", f"{RUN}-3",
    ]  # fmt: skip


BEGUN = """
import json, sys
from lora_utils import stages
from lora_utils.config.loading import load_config
run = stages.train(load_config(None, json.loads(sys.argv[1])))
next(run)
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def begun(data_dir, precompute_dir, tmp_path_factory):
    """A folder with a run in another process that is at its first step, and so has kept nothing yet."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(data_dir, folder / "pictures")
    shutil.copytree(TINY, folder / "base", ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.png"))
    given = json.dumps(settings_of(precompute_dir), default=str)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", BEGUN, given],
        cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert any(line.endswith("begun\n") for line in process.stdout)
    yield folder
    process.communicate()


@pytest.fixture
def alone(begun):
    """`begun` with that one run in it, whichever tests went before."""
    yield begun
    for run in (begun / "runs").iterdir():
        if run.name != RUN:
            shutil.rmtree(run)


@pytest.mark.parametrize(
    ("changed", "begins"),
    [
        ({}, False),
        ({"rank": 4, "output_dir": f"runs/{RUN}"}, False),
        ({"rank": 4}, True),
        ({"rank": 8, "resume_from_checkpoint": "none"}, True),
    ],
    ids=["the same run", "a folder that was given", "another rank", "a new start"],
)
def test_beside_a_run_that_has_kept_nothing_yet_only_another_one_begins(
    alone, precompute_dir, monkeypatch, changed, begins
):
    monkeypatch.chdir(alone)
    config = settings_in(alone, precompute_dir, changed)
    if begins:
        list(stages.train(config))
        assert (alone / "runs" / f"{RUN}-2" / WEIGHTS).is_file()
    else:
        with pytest.raises(InUseError, match="another process"):
            list(stages.train(config))


def test_whoever_compares_need_not_repeat_the_data(places, precompute_dir, tmp_path, monkeypatch, caplog):
    shutil.copytree(places["complete"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    list(stages.train(settings_in(tmp_path / "here", precompute_dir, {"rank": 4})))
    caplog.clear()
    for rank, name in ((16, RUN), (4, f"{RUN}-2")):
        config = settings_in(
            tmp_path / "here", precompute_dir, {"train_data_dir": None, "run_name": "mine", "rank": rank}
        )
        assert find_run(config).name == name
    assert caplog.text == ""
    elsewhere = {"train_data_dir": None, "run_name": "other"}
    assert find_run(settings_in(tmp_path / "here", precompute_dir, elsewhere)).name == "other"


def test_none_without_an_output_dir_begins_a_folder_each_time(places, precompute_dir, tmp_path, monkeypatch):
    shutil.copytree(places["complete"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    config = settings_in(tmp_path / "here", precompute_dir, {"resume_from_checkpoint": "none"})
    before = contents(tmp_path / "here" / "runs" / RUN)
    assert len(list(stages.train(config))) == STEPS
    assert contents(tmp_path / "here" / "runs" / RUN) == before
    assert (tmp_path / "here" / "runs" / f"{RUN}-2" / WEIGHTS).is_file()


def test_other_pictures_are_refused_by_precompute_before_anything_is_encoded(places, tmp_path, monkeypatch):
    shutil.copytree(places["complete"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    change(tmp_path / "here", "picture")
    config = settings_in(tmp_path / "here", tmp_path / "cache", {"output_dir": f"runs/{RUN}"})
    with pytest.raises(CheckpointError, match="1 new"):
        stages.precompute(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "damage",
    ["touch a picture", "cut the LoRA", "cut run.json", "remove run.json", "cut a checkpoint", "other LoRA"],
)
def test_a_complete_run_is_answered_at_once_only_while_all_is_as_it_was(
    places, precompute_dir, tmp_path, monkeypatch, damage
):
    shutil.copytree(places["complete"], tmp_path / "here", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "here" / "runs" / RUN
    config = settings_in(tmp_path / "here", precompute_dir, {})
    before = (folder / WEIGHTS).read_bytes()
    if damage == "touch a picture":
        next((tmp_path / "here" / "pictures").glob("*.png")).touch()
    elif damage == "cut the LoRA":
        (folder / WEIGHTS).write_bytes(before[:100])
    elif damage == "cut run.json":
        (folder / "run.json").write_bytes(b"{")
    elif damage == "remove run.json":
        (folder / "run.json").unlink()
    elif damage == "cut a checkpoint":
        newest = max((folder / "checkpoints").iterdir())
        (newest / "adapter.safetensors").write_bytes(b"")
    else:
        (folder / WEIGHTS).write_bytes(before + b" ")
    assert completed_run(config) is None
    # What takes longer ends in the same weights.
    list(stages.train(config))
    assert (folder / WEIGHTS).read_bytes() == before


def test_a_folder_with_a_lora_of_unknown_origin_is_not_written_into(
    precompute_dir, places, tmp_path, monkeypatch
):
    shutil.copytree(places["complete"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    mine = tmp_path / "here" / "mine"
    mine.mkdir()
    (mine / WEIGHTS).write_bytes(b"a LoRA from elsewhere")
    with pytest.raises(CheckpointError, match="of no run that is known"):
        list(stages.train(settings_in(tmp_path / "here", precompute_dir, {"output_dir": "mine"})))
    assert (mine / WEIGHTS).read_bytes() == b"a LoRA from elsewhere"


def test_pictures_of_the_weights_before_are_set_aside_when_a_run_goes_on(
    places, precompute_dir, tmp_path, monkeypatch
):
    shutil.copytree(places["complete"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    stages.compare(settings_in(tmp_path / "here", precompute_dir, {"num_inference_steps": 1}))
    pictures = tmp_path / "here" / "runs" / RUN / "compare"
    drawn = contents(pictures)
    assert len(drawn) == 4  # two pictures, the sheet and config.yaml
    list(stages.train(settings_in(tmp_path / "here", precompute_dir, {"max_train_steps": 4})))
    assert sorted(path.name for path in pictures.iterdir()) == ["earlier-1"]
    assert [*contents(pictures / "earlier-1").values()] == [*drawn.values()]


def test_the_mirror_gets_what_it_lacks_of_a_complete_run(places, precompute_dir, tmp_path, monkeypatch):
    shutil.copytree(places["complete"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "drive").mkdir()
    folder = tmp_path / "here" / "runs" / RUN
    before = contents(folder)
    monkeypatch.setattr(stages, "_prepare", None)  # the U-Net is not loaded for it
    for _ in range(2):
        list(stages.train(settings_in(tmp_path / "here", precompute_dir, {"mirror_dir": tmp_path / "drive"})))
        assert contents(folder) == before
        mirrored = tmp_path / "drive" / RUN
        assert (mirrored / WEIGHTS).read_bytes() == before[folder / WEIGHTS]
        newest = mirrored / "checkpoints" / f"step-{STEPS:09d}" / "state.json"
        assert newest.read_bytes() == before[folder / newest.relative_to(mirrored)]
        assert any((mirrored / "precomputed").iterdir())
        assert not any(path.name.startswith("earlier") for path in mirrored.iterdir())


PAIRS = (  # one after the other in one folder: flags, exit code, how lines begin that are told once
    ([], 0, ["into        runs/pictures-ci", "the LoRA is in runs/pictures-ci/"]),
    (["--rank", "4"], 0, ["into        runs/pictures-ci-2", "the LoRA is in runs/pictures-ci-2/"]),
    (["--rank", "4"], 0, ["runs/pictures-ci-2 is complete"]),
    (["--rank", "8", "--output_dir", "runs/pictures-ci"], 2, ["RunFolderError: runs/pictures-ci holds"]),
)


def in_two_processes(folder, arguments):
    """Exit codes and all lines of two processes that know of each other as torchrun's do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in ("0", "1"):
        known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | known | {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "lora_utils", *map(str, arguments)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, **output))
    said = [line for process in processes for line in process.communicate()[0].splitlines()]
    return [process.returncode for process in processes], said


def test_two_processes_agree_on_the_folder_and_one_of_them_tells(data_dir, precompute_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "pictures")
    flags = ["--train_data_dir", "pictures", "--precompute_dir", precompute_dir, "--max_train_steps", "1"]
    for changed, code, lines in PAIRS:
        codes, said = in_two_processes(tmp_path, ["train", "--config", "ci", *flags, *changed])
        assert codes == [code, code]
        for line in lines:
            assert sum(told.startswith(line) for told in said) == 1, line
        assert not any("gloo" in told for told in said)  # nobody waits for who has refused
