"""null, none and an empty text mean "not given", in every form and whatever the preset says."""

from pathlib import Path
from typing import get_args

import pytest

from lora_utils.config.flags import read_flags
from lora_utils.config.loading import ConfigError, all_settings, dump_config, load_config
from lora_utils.config.section import EXPAND

# A value that a preset could hold, by what the setting is made of.
SAMPLES = {Path: "somewhere", str: "word", int: 3, float: 2.5}
NO_SUCH = {"max_token_length": 150, "max_timestep": 300}
OPTIONAL = [leaf for leaf, (_, field) in all_settings().items() if type(None) in get_args(field.annotation)]
OBLIGATORY = [
    leaf
    for leaf, (_, field) in all_settings().items()
    if leaf not in OPTIONAL and field.default != "none" and "none" not in get_args(field.annotation)
]
WORDS = ["none", "null", "None", " NONE "]


def value_of(config, leaf):
    return getattr(getattr(config, all_settings()[leaf][0]), leaf)


def parts(annotation):
    return [annotation, *(inner for part in get_args(annotation) for inner in parts(part))]


def sample(leaf):
    """A sound value of a setting, and its YAML."""
    field = all_settings()[leaf][1]
    return NO_SUCH.get(leaf) or next(SAMPLES[part] for part in parts(field.annotation) if part in SAMPLES)


@pytest.fixture
def preset(tmp_path):
    def write(leaf):
        file = tmp_path / "preset.yaml"
        file.write_text(f"{leaf}: {sample(leaf)}\n")
        assert value_of(load_config(file), leaf) not in (None, all_settings()[leaf][1].default)
        return file

    return write


def test_there_are_settings_of_both_sorts():
    assert len(OPTIONAL) > 20
    assert len(OBLIGATORY) > 40


@pytest.mark.parametrize("leaf", OPTIONAL)
def test_every_optional_setting_of_a_preset_can_be_unset(leaf, preset, tmp_path):
    file = preset(leaf)
    bare = load_config(Path(file.with_name("preset.yaml")), {leaf: None})
    expected = value_of(bare, leaf)
    # A run folder's name is made where none is given.
    assert expected is None or leaf == "run_name"
    for word in WORDS:
        given, others = read_flags([f"--{leaf}", word])
        assert not others
        assert load_config(file, given) == bare
        assert load_config(file, {leaf: word}) == bare
    for text in ("null", "none", "~", ""):
        other = tmp_path / "preset.yaml"
        other.write_text(f"{leaf}: {text}\n")
        assert load_config(other) == bare


@pytest.mark.parametrize("leaf", OPTIONAL)
@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_text_is_the_default_of_an_optional_setting(leaf, blank, preset):
    file = preset(leaf)
    given, _ = read_flags([f"--{leaf}={blank}"])
    default = all_settings()[leaf][1].default
    assert value_of(load_config(file, given), leaf) == default or leaf == "run_name"
    assert load_config(file, {leaf: blank}) == load_config(file, given)


@pytest.mark.parametrize("leaf", OBLIGATORY)
@pytest.mark.parametrize("nothing", [None, "none", "null", ""])
def test_what_must_have_a_value_says_so(leaf, nothing, tmp_path):
    file = tmp_path / "preset.yaml"
    if nothing == "" and EXPAND in all_settings()[leaf][1].metadata:
        file.write_text(f"{leaf}: preset/base\n")
        assert value_of(load_config(file, {leaf: nothing}), leaf) == "preset/base"
        return
    with pytest.raises(ConfigError, match=f"^{leaf}: must have a value"):
        load_config(None, {leaf: nothing})
    file.write_text(f"{leaf}: {'null' if nothing is None else repr(nothing)}\n")
    with pytest.raises(ConfigError, match=f"^{leaf}: must have a value"):
        load_config(file)


def test_where_none_is_a_choice_it_is_one():
    assert load_config(None, {"gradient_checkpointing": "None"}).train.gradient_checkpointing == "none"
    for nothing in (None, "null", ""):
        with pytest.raises(ConfigError, match="gradient_checkpointing"):
            load_config(None, {"gradient_checkpointing": nothing})
        assert (
            load_config(None, {"resume_from_checkpoint": nothing}).checkpoint.resume_from_checkpoint == "none"
        )


@pytest.mark.parametrize("nothing", ["none", "", None])
def test_the_newest_checkpoint_of_a_preset_can_be_left_alone(nothing, tmp_path):
    file = tmp_path / "preset.yaml"
    file.write_text("resume_from_checkpoint: latest\n")
    assert load_config(file, {"resume_from_checkpoint": nothing}).checkpoint.resume_from_checkpoint == "none"


def test_an_unset_run_reads_back_as_itself(tmp_path):
    config = load_config(None, dict.fromkeys(OPTIONAL, "none") | {"run_name": "mine"})
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("preset_says", "flags_say", "steps", "epochs"),
    [
        ("max_train_steps: 500", {"num_train_epochs": "3"}, None, 3),
        ("max_train_steps: 500", {"num_train_epochs": 3, "max_train_steps": 7}, 7, 3),
        ("max_train_steps: 500", {"max_train_steps": 7}, 7, 100),
        ("max_train_steps: 500", {"max_train_steps": "none"}, None, 100),
        ("max_train_steps: 500", {"num_train_epochs": 3, "max_train_steps": "none"}, None, 3),
        ("max_train_steps: 500", {"rank": 4}, 500, 100),
        ("num_train_epochs: 9", {"max_train_steps": 7}, 7, 100),
        ("num_train_epochs: 9", {"num_train_epochs": 3}, None, 3),
        ("{num_train_epochs: 9, max_train_steps: 5}", {"num_train_epochs": 3}, None, 3),
        ("{num_train_epochs: 9, max_train_steps: 5}", {}, 5, 9),
        ("train: {max_train_steps: 500}", {"train": {"num_train_epochs": 3}}, None, 3),
    ],
)
def test_who_names_steps_or_epochs_unsets_the_other(tmp_path, preset_says, flags_say, steps, epochs):
    file = tmp_path / "preset.yaml"
    file.write_text(preset_says)
    train = load_config(file, flags_say).train
    assert (train.max_train_steps, train.num_train_epochs) == (steps, epochs)
