"""A run that was stopped goes on bit by bit as if it had not been; changes are told, or refused."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.faults.campaigns import cut_at, result_in
from benchmarks.faults.contenders import Ours
from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.storage.checkpoint import CheckpointError
from tests.conftest import TINY

STEPS = 13
OPTIMISERS = {
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedulefree": {"optimizer": "schedulefree", "lr_scheduler": "constant"},
    "adafactor": {"optimizer": "adafactor"},
    "paged_adamw8bit": {"optimizer": "paged_adamw8bit"},
    "a weight average": {"use_ema": True},
    "LoRA+": {"loraplus_lr_ratio": 4.0},
}


@pytest.fixture(scope="module")
def settings(tiny_settings):
    return tiny_settings | {
        "train_batch_size": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "checkpointing_steps": 4,
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A run of three steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    given = {
        "output_dir": folder,
        "max_train_steps": 3,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 3,
    }
    list(stages.train(load_config(None, settings | given)))
    return folder


@pytest.fixture
def again(finished, settings, tmp_path):
    """Goes on with a copy of that run; other settings may be given."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)

    def train(**changed):
        given = {"output_dir": folder, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
        return [report.step for report in stages.train(load_config(None, settings | given | changed))]

    train.folder = folder
    return train


def assert_all_equal(straight, found, cuts):
    assert found.keys() == set(cuts)
    for step, one in found.items():
        assert one == straight, f"cut after step {step}"
    steps = [record[0] for record in straight.records]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("changed", "cuts"),
    [
        ({"optimizer": "adamw8bit", "lora_dropout": 0.1, "gradient_accumulation_steps": 2}, (1, 12)),
        (
            {"enable_bucket": True, "min_bucket_reso": 48, "bucket_reso_steps": 16, "validation_split": 0.2},
            (6,),
        ),
    ],
    ids=["8-bit states, dropout, accumulation", "buckets, held-out loss"],
)
def test_a_run_that_is_cut_ends_in_the_same_bytes(settings, pictures, tmp_path, changed, cuts):
    for path in sorted(pictures.glob("*.jpg"))[::2]:
        with Image.open(path) as image:
            part = image.crop((0, 0, 64, 40))
        part.save(path)
    given = {"train_data_dir": pictures, "max_train_steps": STEPS, "validation_steps": 7}
    straight, found = cut_at(
        Ours(settings | given | changed), tmp_path / "runs", cuts
    )  # all of them in the long form
    assert_all_equal(straight, found, cuts)


@pytest.mark.parametrize("changed", OPTIMISERS.values(), ids=OPTIMISERS)
def test_every_optimiser_goes_on_where_it_was(settings, tmp_path, changed):
    straight, found = cut_at(Ours(settings | {"max_train_steps": 4} | changed), tmp_path, [2])
    assert_all_equal(straight, found, [2])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_convolutions_go_on_where_they_were_in_another_layout(settings, tmp_path, optimizer):
    changed = {"target_modules": ["full"], "channels_last": True, "lean_step": False, "max_train_steps": 4}
    straight, found = cut_at(Ours(settings | changed | {"optimizer": optimizer}), tmp_path, [2])
    assert_all_equal(straight, found, [2])


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_nothing_else(
    settings, finished, again, caplog
):
    newest = again.folder / "checkpoints" / "step-000000003"
    (newest / "adapter.safetensors").write_bytes(bytes(9))
    assert again(max_train_steps=3) == [3]
    assert "the checkpoint of step 3 is damaged" in caplog.text
    assert result_in(Ours(settings), again.folder.parent) == result_in(Ours(settings), finished.parent)


def test_other_rates_and_more_steps_are_accepted_told_and_recorded(again, caplog):
    assert again(learning_rate=2e-3, max_train_steps=5) == [4, 5]
    told = ["learning_rate was 0.001, is 0.002", "steps was 3, is 5"]
    assert "since the checkpoint: " + "; ".join(told) in caplog.text
    summary = json.loads((again.folder / "summary.json").read_text())
    assert summary["resumed"] == [{"step": 3, "changed": told}]


def test_another_adapter_optimiser_or_seed_is_refused_and_all_differences_are_listed(again):
    with pytest.raises(
        CheckpointError, match=r"optimizer was adamw, is adafactor; rank was .*seed was 0, is 1"
    ) as told:
        again(rank=4, optimizer="adafactor", seed=1)
    assert "new output_dir" in str(told.value)


def test_other_data_is_refused(again, pictures):
    next(pictures.glob("*.txt")).write_text("another caption")
    with pytest.raises(CheckpointError, match=r"data is other now: 1 with another caption \(ink_0"):
        again(train_data_dir=pictures)


def test_another_base_model_is_refused(again, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY, base, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file = next((base / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights["conv_in.bias"] += 0.01
    save_file(weights, file)
    with pytest.raises(CheckpointError, match="base is other now"):
        again(pretrained_model_name_or_path=str(base))


def test_resume_force_takes_over_what_fits(again, caplog):
    assert again(optimizer="adafactor", seed=1, resume_force=True) == [4]
    assert "the optimiser's states are of another kind and start afresh" in caplog.text
    summary = json.loads((again.folder / "summary.json").read_text())
    assert "seed was 0, is 1" in summary["resumed"][0]["changed"]


def test_resume_force_cannot_give_an_adapter_another_rank(again):
    with pytest.raises(CheckpointError, match="another rank"):
        again(rank=4, resume_force=True)


def test_none_starts_anew_and_sets_the_earlier_run_aside_whole(again, caplog):
    written = {path.name for path in again.folder.iterdir()}
    weights = (again.folder / "pytorch_lora_weights.safetensors").read_bytes()
    assert again(resume_from_checkpoint="none", max_train_steps=1) == [1]
    aside = again.folder / "earlier-1"
    assert {path.name for path in aside.iterdir()} == written >= {"metrics.jsonl", "summary.json", "run.json"}
    assert (aside / "pytorch_lora_weights.safetensors").read_bytes() == weights
    checkpoints = sorted(path.name for path in (aside / "checkpoints").iterdir())
    assert checkpoints == [f"step-00000000{step}" for step in (1, 2, 3)]
    assert str(aside) in caplog.text
    assert again(resume_from_checkpoint="latest", max_train_steps=2) == [2]


@pytest.mark.parametrize("name", ["step-000000001", "{folder}/checkpoints/step-000000001"])
def test_a_checkpoint_can_be_named_and_later_ones_are_moved_aside(again, name):
    assert again(resume_from_checkpoint=name.format(folder=again.folder), max_train_steps=3) == [2, 3]
    assert len(list((again.folder / "checkpoints.old-1").iterdir())) == 2
    assert (again.folder / "earlier-1" / "pytorch_lora_weights.safetensors").is_file()


def test_a_checkpoint_that_is_not_there_is_an_error_that_lists_those_that_are(again):
    with pytest.raises(
        CheckpointError, match=r"no checkpoint step-7.*step-000000001, step-000000002, step-000000003"
    ):
        again(resume_from_checkpoint="step-7")


def test_folders_of_other_names_disturb_nothing_and_are_left_alone(again):
    folder = again.folder / "checkpoints"
    strays = [
        folder / name
        for name in ("checkpoint-4 (1)", "checkpoint-best", "step-000000004 (1)", "step-9", "notes")
    ]
    for stray in strays:
        shutil.copytree(folder / "step-000000002", stray)
    assert again() == [4]
    assert all((stray / "state.json").exists() for stray in strays)


def test_a_folder_of_accelerate_is_refused_with_advice(again, tmp_path):
    foreign = tmp_path / "checkpoint-500"
    foreign.mkdir()
    torch.save({"state": {}}, foreign / "optimizer.bin")
    with pytest.raises(CheckpointError, match=r"another program \(optimizer.bin\).*start anew"):
        again(resume_from_checkpoint=str(foreign))
