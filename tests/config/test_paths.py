"""``~`` and ``$VAR`` mean the same in every path; nothing empty is ever the current folder."""

import os
from pathlib import Path
from typing import get_args

import pytest

from lora_utils.cli import main, parse
from lora_utils.config.flags import read_flags
from lora_utils.config.loading import ConfigError, all_settings, dump_config, find_config, load_config
from lora_utils.config.section import EXPAND


def parts(annotation):
    return [annotation, *(inner for part in get_args(annotation) for inner in parts(part))]


PATHS = [
    leaf for leaf, (_, field) in all_settings().items() if EXPAND in field.metadata + parts(field.annotation)
]
TYPED_AS_PATHS = [leaf for leaf, (_, field) in all_settings().items() if Path in parts(field.annotation)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("PICTURES", str(tmp_path / "pictures"))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(leaf, value):
    return value_of(load_config(None, {leaf: value}), leaf)


def value_of(config, leaf):
    given = getattr(getattr(config, all_settings()[leaf][0]), leaf)
    return [str(item) for item in given] if isinstance(given, list) else str(given)


def test_the_paths_are_known():
    assert len(PATHS) >= 12
    assert set(TYPED_AS_PATHS) <= set(PATHS)
    names = {
        "pretrained_model_name_or_path",
        "pretrained_vae_model_name_or_path",
        "dataset_name",
        "lora_path",
    }
    assert names | {"resume_from_checkpoint", "mirror_dir", "output_dir", "train_data_dir"} <= set(PATHS)


@pytest.mark.parametrize("leaf", PATHS)
def test_home_and_variables_are_expanded_in_every_path_and_form(leaf, home):
    expected = {
        "~/x": f"{home}/x",
        "~": str(home),
        "$PICTURES/a b": f"{home}/pictures/a b",
        "${PICTURES}/x": f"{home}/pictures/x",
        "relative/x": "relative/x",
        "a~b/x": "a~b/x",
        "costs $5": "costs $5",
    }
    for text, path in expected.items():
        wanted = [path] if leaf == "train_data_dir" else path
        file = home / "run.yaml"
        file.write_text(f"{leaf}: '{text}'\n")
        config = load_config(file)
        assert value_of(config, leaf) == read(leaf, text) == wanted
        assert read(leaf, Path(text)) == wanted
        assert load_config(None, read_flags([f"--{leaf}={text}"])[0]) == load_config(None, {leaf: text})
        # What was written down means the same again.
        file.write_text(dump_config(config))
        assert load_config(file) == config


@pytest.mark.parametrize("leaf", PATHS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$UNSET/x", r"\$UNSET, which is not set"),
        ("${EMPTY}/x", r"\$EMPTY, which is empty"),
        ("~nobody0/x", "a user"),
    ],
)
def test_what_cannot_be_expanded_is_refused_by_name(leaf, text, words, home):
    with pytest.raises(ConfigError, match=f"{leaf}: .*{words}"):
        load_config(None, {leaf: text})


def test_names_with_dollars_and_tildes_that_are_there_are_taken_as_they_are(home):
    (home / "cash$UNSET").mkdir()
    (home / "~nobody0").mkdir()
    assert read("train_data_dir", "cash$UNSET") == ["cash$UNSET"]
    assert read("output_dir", "~nobody0") == "~nobody0"
    (home / "~").mkdir()  # what an earlier version made of ~/runs
    assert read("output_dir", "~") == str(home)


def test_a_variable_with_a_token_is_not_written_into_a_path(home, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_" + "A1b2" * 8)
    with pytest.raises(ConfigError, match="HF_TOKEN") as error:
        load_config(None, {"output_dir": "runs/$MY_TOKEN"})
    assert "A1b2" not in str(error.value)


@pytest.mark.parametrize("leaf", PATHS)
@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_an_empty_path_is_not_given(leaf, blank, home):
    assert load_config(None, {leaf: blank}) == load_config()
    assert load_config(None, {leaf: [blank]} if leaf == "train_data_dir" else {leaf: blank}) == load_config()


def test_an_empty_path_among_others_is_left_out(home):
    assert read("train_data_dir", ["a", "", "b"]) == ["a", "b"]
    assert load_config(None, {"train_data_dir": []}).data.train_data_dir is None


@pytest.mark.parametrize("text", ["~/mine.yaml", "$PICTURES/../mine.yaml", "mine.yaml"])
def test_a_config_file_is_found_as_other_paths_are(text, home):
    (home / "pictures").mkdir()
    (home / "mine.yaml").write_text("rank: 3\n")
    assert load_config(find_config(text)).lora.rank == 3
    assert parse(["train", f"--config={text}"]).config.lora.rank == 3


@pytest.mark.parametrize("text", ["", " ", "$UNSET/mine.yaml", "~nobody0/mine.yaml"])
def test_a_config_file_that_cannot_be_meant_is_refused(text, home, capsys):
    with pytest.raises(ConfigError, match="config"):
        find_config(text)
    assert main(["train", f"--config={text}"]) == 2
    assert "ConfigError" in capsys.readouterr().err


@pytest.mark.parametrize("leaf", PATHS)
def test_a_number_for_a_path_is_to_be_quoted(leaf, home):
    with pytest.raises(ConfigError, match=f"{leaf}: .*put it in quotes"):
        load_config(None, {leaf: 2024})


@pytest.mark.parametrize("leaf", [*PATHS, "prompt", "negative_prompt", "trigger_word"])
@pytest.mark.parametrize("content", [os.fsdecode(b"caf\xe9"), "a\0b"], ids=["latin-1", "null"])
def test_bytes_that_no_file_can_hold_are_refused(leaf, content):
    with pytest.raises(ConfigError, match=f"{leaf}: holds bytes that are no UTF-8"):
        load_config(None, {leaf: content})
    with pytest.raises(ConfigError, match="prompt: holds bytes"):
        load_config(None, {"prompt": ["good", content]})
