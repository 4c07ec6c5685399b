"""Datasets that cannot be opened: every failure says what to do."""

import datasets
import pytest

from lora_utils.config.data import DataConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def refusal(name, **settings):
    with pytest.raises(DataError) as error:
        find_examples(DataConfig(dataset_name=str(name), **settings))
    return str(error.value)


def test_what_cannot_be_loaded_is_an_error_with_its_cure(tmp_path):
    script = tmp_path / "made" / "made.py"
    script.parent.mkdir()
    script.write_text("raise AssertionError('executed')")
    message = refusal(script.parent)
    assert 'revision="refs/convert/parquet"' in message
    assert "a Python file of your own" in message
    two = tmp_path / "two"
    two.mkdir()
    two.joinpath("README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en.csv\n"
        "- config_name: de\n  data_files: de.csv\n---\n"
    )
    for name in ("en", "de"):
        two.joinpath(f"{name}.csv").write_text("image,text\na,b\n")
    assert "['en', 'de']" in refusal(two)
    assert "set dataset_config_name" in refusal(two)
    assert "set dataset_config_name" in refusal(two, dataset_config_name="fr")
    assert "none of the images of two[train]" in refusal(two, dataset_config_name="de")
    only = tmp_path / "only"
    only.mkdir()
    only.joinpath("test.csv").write_text("image,text\na.png,b\n")
    assert "Should be one of ['test'].); set dataset_split" in refusal(only)
    assert "set dataset_split to a split" in refusal(only, dataset_split="test[")
    assert "set dataset_split to a larger part" in refusal(only, dataset_split="test[:0]")


@pytest.mark.parametrize(
    ("name", "content", "cure"),
    [
        ("train.csv", "image,text\na,é".encode("latin-1"), "save its files as UTF-8"),
        ("train.jsonl", b'{"image": "a"}\n{bad', "check its files"),
        ("train.parquet", b"PAR1", "check its files"),
        ("train.md", b"nothing", "put tables"),
        ("README.md", b"---\nconfigs: [\n---", "check its files"),
    ],
)
def test_damaged_tables_are_an_error_with_its_cure(tmp_path, name, content, cure):
    (tmp_path / name).write_bytes(content)
    assert cure in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("lambdalabs/naruto-blip-captions", "connect to the internet and unset HF_HUB_OFFLINE"),
        ("https://huggingface.co/datasets/u/n", "set dataset_name to what follows huggingface.co/datasets/"),
        ("/absent/folder", "there is no folder or file /absent/folder"),
        ("imagefolder", "set train_data_dir"),
        ("pictures.zip", "unpack it"),
    ],
)
def test_names_that_lead_nowhere_are_an_error_with_its_cure(tmp_path, monkeypatch, name, cure):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures.zip").touch()
    assert cure in refusal(name)
