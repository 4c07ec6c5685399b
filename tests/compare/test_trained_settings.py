"""A run's LoRA is drawn with the base, VAE and resolution of its training, unless others are named."""

import shutil

import pytest

from lora_utils import stages
from lora_utils.config.errors import ConfigError
from lora_utils.config.loading import find_config, load_config
from lora_utils.config.strict_yaml import read_yaml, write_yaml
from lora_utils.config.trained import as_trained, run_settings
from tests.conftest import TINY

QUICK = {"prompt": "a", "num_inference_steps": 1, "guidance_scale": 1.0}
TRAINED = {
    "pretrained_model_name_or_path": "somebody/their-sdxl",
    "pretrained_vae_model_name_or_path": "somebody/their-vae",
    "revision": "v2",
    "variant": None,
    "resolution": "640x960",
    "max_token_length": 150,
    "rescale_betas_zero_snr": True,
}


def write_run(folder, **settings):
    """A run folder that holds no more than its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(None, TRAINED | settings)
    (folder / "config.yaml").write_text(write_yaml(config.model_dump(mode="json")))
    return folder


def settled(folder, preset=None, **named):
    """What a comparison is drawn with, by leaf name."""
    file = find_config(preset) if isinstance(preset, str) else preset
    config = as_trained(load_config(file, named), run_settings(folder), folder)
    return {leaf: value for _, section in config for leaf, value in section}


def subset(settings):
    return {name: settings[name] for name in TRAINED}


FROM_RUN = TRAINED | {"resolution": (640, 960)}
BASE = "pretrained_model_name_or_path"
VAE = "pretrained_vae_model_name_or_path"
DEFAULTS = {VAE: None, "revision": None, "variant": None}


@pytest.mark.parametrize("preset", [None, "t4", "tiny", "ci", "bdd_a100", "naruto_t4"])
def test_defaults_and_presets_give_way_to_the_run(tmp_path, preset):
    assert subset(settled(write_run(tmp_path / "run"), preset)) == FROM_RUN


@pytest.mark.parametrize(
    ("named", "drawn"),
    [
        ({"resolution": 512}, FROM_RUN | {"resolution": (512, 512)}),
        ({"resolution": 1024}, FROM_RUN | {"resolution": (1024, 1024)}),  # the default, and yet named
        ({"variant": "fp16"}, FROM_RUN | {"variant": "fp16"}),
        ({"revision": "none"}, FROM_RUN | {"revision": None}),
        ({VAE: "x/vae"}, FROM_RUN | {VAE: "x/vae"}),
        ({VAE: ""}, FROM_RUN | {VAE: None}),
        ({"rescale_betas_zero_snr": False}, FROM_RUN | {"rescale_betas_zero_snr": False}),
        ({"max_token_length": 77}, FROM_RUN | {"max_token_length": 77}),
        # Another base's files need have neither this variant nor this revision, nor go with this VAE.
        ({BASE: "x/y"}, FROM_RUN | DEFAULTS | {BASE: "x/y"}),
        ({BASE: "somebody/their-sdxl"}, FROM_RUN),
        ({"prompt": ["x"], "seeds": [3], "adapter_scale": 0.5}, FROM_RUN),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("form", ["override", "file"])
def test_what_the_user_names_stays(tmp_path, named, drawn, form):
    folder = write_run(tmp_path / "run")
    if form == "override":
        assert subset(settled(folder, **named)) == drawn
    else:
        file = tmp_path / "mine.yaml"
        file.write_text(write_yaml(named))
        assert subset(settled(folder, file)) == drawn


def test_nothing_else_of_the_run_is_taken(tmp_path):
    folder = write_run(
        tmp_path / "run", prompt=["theirs"], seeds=[9], output_dir="theirs", mixed_precision="fp16"
    )
    drawn = settled(folder)
    assert drawn == FROM_RUN | {name: drawn[name] for name in drawn.keys() - FROM_RUN.keys()}
    assert drawn["prompt"] == ["a photo"]
    assert (drawn["output_dir"], drawn["mixed_precision"]) == (None, "auto")


def make_base(folder):
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("written", ["models/own", "./models/own", "models/deep/own"])
@pytest.mark.parametrize("leaf", [BASE, VAE])
def test_a_relative_path_is_meant_from_where_the_run_was_started(tmp_path, monkeypatch, written, leaf):
    there = tmp_path / "there"
    make_base(there / written)
    folder = write_run(there / "runs" / "x", output_dir="runs/x", **{leaf: written})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert settled(folder)[leaf] == str(there / written)
    # Moved and renamed: from where we are.
    shutil.move(folder, tmp_path / "renamed")
    make_base(tmp_path / "here" / written)
    assert settled(tmp_path / "renamed")[leaf] == str(
        (tmp_path / "here" / written).relative_to(tmp_path / "here")
    )


@pytest.mark.parametrize("written", ["./models/own", "../own", "models/deep/own", "/absent/own", "own/"])
def test_a_base_that_is_gone_is_asked_for(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run", pretrained_model_name_or_path=written)
    with pytest.raises(ConfigError, match="set pretrained_model_name_or_path to where it is now") as caught:
        settled(folder, "t4")
    assert str(folder / "config.yaml") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert settled(folder, pretrained_model_name_or_path="x/y")["pretrained_model_name_or_path"] == "x/y"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "job: extension\nconfig:\n  name: another trainer's\n",
        "model:\n  name_or_path: another/trainer\n",
        "- a list\n",
        "model: [broken",
        "model: {pretrained_model_name_or_path: a, pretrained_model_name_or_path: b}",
        "\0",
    ],
    ids=repr,
)
def test_a_lora_without_a_run_is_drawn_as_the_settings_say(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert run_settings(tmp_path) is None


def test_a_value_that_is_impossible_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    tree = read_yaml(folder / "config.yaml")
    tree["data"]["resolution"] = -3
    (folder / "config.yaml").write_text(write_yaml(tree))
    with pytest.raises(ConfigError, match="resolution"):
        settled(folder)


@pytest.mark.parametrize("form", ["folder", "file", "output_dir", "renamed", "by a link", "with a preset"])
def test_a_run_is_drawn_with_its_base_at_its_size(run, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    folder = run
    if form == "renamed":
        folder = run.rename(tmp_path / "elsewhere")
    if form == "by a link":
        folder = tmp_path / "link"
        folder.symlink_to(run)
    named = {"lora_path": folder}
    if form == "file":
        named = {"lora_path": folder / "pytorch_lora_weights.safetensors"}
    if form == "output_dir":
        named = {"output_dir": folder}
    preset = find_config("t4") if form == "with a preset" else None
    result = stages.compare(load_config(preset, QUICK | named))
    assert result.finetuned[0].size == (64, 64)
    assert result.folder == folder / "compare"
    drawn = read_yaml(result.folder / "config.yaml")
    assert drawn["model"]["pretrained_model_name_or_path"] == str(TINY)
    assert (drawn["data"]["resolution"], drawn["model"]["variant"]) == (64, None)


def test_a_downloaded_lora_is_drawn_as_the_settings_say(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = (run / "pytorch_lora_weights.safetensors").rename(tmp_path / "downloaded.safetensors")
    settings = {
        "pretrained_model_name_or_path": "tiny",
        "resolution": 72,
        "lora_path": file,
        "output_dir": "o",
    }
    result = stages.compare(load_config(None, QUICK | settings))
    assert result.finetuned[0].size == (72, 72)
    assert result.folder.as_posix() == "o/compare"
