"""CSV as people and programs write it: the same captions in every door, and tables about other things."""

import unicodedata

import datasets
import pytest

from lora_utils.config.data import DataConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError

NFC = unicodedata.normalize("NFC", "é")
NFD = unicodedata.normalize("NFD", "é")
NAMES = ("a.png", "b.png", "c.png", "d.png")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows(*captions, header="file_name,text", end="\n"):
    """A line for each of the captions, about a.png and its neighbours."""
    separator = next(char for char in header if char in ",;\t|")
    lines = [f"{name}{separator}{caption}" for name, caption in zip(NAMES, captions, strict=False)]
    return end.join([header, *lines]) + end


# The captions of a.png, b.png … that a text holds.
DIALECTS = {
    "commas": (rows("a dog", "a cat"), ["a dog", "a cat"]),
    "semicolons": (rows("a dog, red", "a cat", header="file_name;text"), ["a dog, red", "a cat"]),
    "tabs": (rows("a dog; red, tall", header="file_name\ttext"), ["a dog; red, tall"]),
    "bars": (rows("a dog, red", header="file_name|text"), ["a dog, red"]),
    "Excel's own line": ("sep=;\r\n" + rows("a dog", header="file_name;text", end="\r\n"), ["a dog"]),
    "byte-order mark": ("\ufeff" + rows("a dog", header="image;caption"), ["a dog"]),
    "old line ends": (rows("a dog", "a cat", end="\r"), ["a dog", "a cat"]),
    "UTF-16": (rows("ein Hündchen").encode("utf-16"), ["ein Hündchen"]),
    "None, NA and the like": (rows("None", "NA", "nan", "null"), ["None", "NA", "nan", "null"]),
    "digits": (rows("7", "007", "1e3", "3.50"), ["7", "007", "1e3", "3.50"]),
    "dates and truth": (rows("2024-01-01", "true", "False"), ["2024-01-01", "true", "False"]),
    "some digits": (rows("1984", "a dog"), ["1984", "a dog"]),
    "quotes": (rows('"a ""dog"", red"', '"a\ncat"'), ['a "dog", red', "a cat"]),
    "quoted header": ('"file_name";"text"\n"a.png";"a dog"\n', ["a dog"]),
    "more columns": ("id,file_name,text,score\n1,a.png,a dog,\n", ["a dog"]),
    "a column without name": (",file_name,text\n0,a.png,a dog\n", ["a dog"]),
    "empty lines": ("\n\nfile_name,text\n\na.png,a dog\n\n", ["a dog"]),
    "a bad line between": ("file_name,text\nb.png,a cat, red\na.png,a dog\n", ["a dog"]),
    "an empty caption": (rows("a dog", ""), ["a dog"]),
    "backslashes": ("file_name,text\n.\\a.png,a dog\n", ["a dog"]),
}
DOORS = ("metadata", "another table", "file", "folder", "folder without images", "tabs by name")


def open_door(door, folder, text):
    """The captions by image that a door finds for a table, and what it remarks on."""
    content = text if isinstance(text, bytes) else text.encode()
    data = folder / "data"
    data.mkdir()
    for name in NAMES:
        (data / name).write_text(name)
    names = {"metadata": "metadata.csv", "another table": "mine.csv", "tabs by name": "train.tsv"}
    table = data / names.get(door, "train.csv")
    settings = {"dataset_name": str(data)}
    if door in ("metadata", "another table"):
        settings = {"train_data_dir": data}
    elif door == "folder without images":
        settings = {"dataset_name": str(folder / "table")}
        table = folder / "table" / "train.csv"
        table.parent.mkdir()
        encoding = "utf-16" if b"\0" in content else "utf-8"
        content = content.decode(encoding).replace(".png", ".png.bin").encode(encoding)
        for name in NAMES:
            (table.parent / f"{name}.bin").write_text(name)
    elif door == "file":
        settings = {"dataset_name": str(table)}
    table.write_bytes(content)
    found = find_examples(DataConfig(**settings))
    return {example.read().decode(): example.captions for example in found.examples}, found.findings


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_read_the_same_in_every_door(tmp_path, door, name):
    text, captions = DIALECTS[name]
    learned, findings = open_door(door, tmp_path, text)
    assert learned == {image: (caption,) for image, caption in zip(NAMES, captions, strict=False)}
    problems = " ".join(finding.problem for finding in findings)
    assert ("wrong number of fields" in problems) == (name == "a bad line between")
    assert ("empty caption" in problems) == (name == "an empty caption")


@pytest.mark.parametrize("split", ["train[:2]", "train[1:]", "train[:50%]"])
def test_a_part_of_a_csv_can_be_named(tmp_path, split):
    (tmp_path / "x.csv").write_text(rows("a", "b", "c", "d"))
    for name in NAMES:
        (tmp_path / name).touch()
    found = find_examples(DataConfig(dataset_name=str(tmp_path / "x.csv"), dataset_split=split))
    right = {"train[:2]": "ab", "train[1:]": "bcd", "train[:50%]": "ab"}[split]
    assert [example.captions[0] for example in found.examples] == list(right)


def test_files_of_a_split_are_one_table(tmp_path):
    for number, name in enumerate(NAMES[:3]):
        split = "test" if number == 2 else "train"
        (tmp_path / f"{split}-0000{number}.csv").write_text(f"image;text\n{name}.bin;{number:03d}\n")
        (tmp_path / f"{name}.bin").touch()
    for split, right in {
        "train": ["000", "001"],
        "test": ["002"],
        "train+test": ["000", "001", "002"],
    }.items():
        found = find_examples(DataConfig(dataset_name=str(tmp_path), dataset_split=split))
        assert [example.captions[0] for example in found.examples] == right
    with pytest.raises(DataError, match=r"Unknown split .*; set dataset_split"):
        find_examples(DataConfig(dataset_name=str(tmp_path), dataset_split="all"))


# Beside a.png with a caption of its own in a.txt, or without: what is learned from dataset_name.
STRAYS = {
    "notes.csv": "date,note\n2024-01-01,a.png is nice\n",
    "results.csv": "image,prompt,score\nout_1.png,a cat,0.5\n",
    "scores.csv": "file,score\na.png,0.5\n",
    "ranks.csv": "file,prompt,score\na.png,a cat,0.5\n",
    "a.json": '{"image": "a.png", "caption": "a cat"}',
    "workflow.json": '{"nodes": []}',
    "log.jsonl": '{"step": 1, "loss": 0.5}\n',
    "broken.csv": b"\xe9,\xe9\n",
    "broken.json": "[" * 100_000,
}


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_table_beside_captioned_images_does_not_decide(tmp_path, name):
    for file, content in {"a.png": "", "a.txt": "a dog", name: STRAYS[name]}.items():
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for settings in ({"dataset_name": str(tmp_path)}, {"train_data_dir": tmp_path}):
        found = find_examples(DataConfig(**settings))
        assert [(example.source, example.captions) for example in found.examples] == [("a.png", ("a dog",))]
        assert name in str(found.findings) or "neither image nor caption" in str(found.findings)


def test_a_table_decides_where_it_is_about_the_images(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "notes.csv").write_text(STRAYS["notes.csv"])
    (tmp_path / "mine.csv").write_text("file,caption\na.png,a cat\n")
    found = find_examples(DataConfig(dataset_name=str(tmp_path)))
    assert [example.captions for example in found.examples] == [("a cat",)]
    (tmp_path / "a.txt").write_text("a dog")
    found = find_examples(DataConfig(dataset_name=str(tmp_path), caption_column="caption"))
    assert [example.captions for example in found.examples] == [("a cat",)]


@pytest.mark.parametrize(
    ("file", "written"),
    [("images/a.png", "a.png"), (f"{NFD}.png", f"{NFC}.png"), (f"i/{NFC}.png", f"i\\{NFD}.png")],
)
def test_the_image_that_a_table_means_is_found(tmp_path, file, written):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("right")
    (tmp_path / "captions.csv").write_text(f"image,text\n{written},a dog\nabsent.png,x\n")
    for name in (tmp_path, tmp_path / "captions.csv"):
        found = find_examples(DataConfig(dataset_name=str(name)))
        assert [(example.read(), example.captions) for example in found.examples] == [(b"right", ("a dog",))]
        refused = [finding.problem for finding in found.findings if finding.kind == "refused"]
        assert refused == ["file that cannot be opened (No such file or directory: absent.png)"]
        told = [finding.problem for finding in found.findings if finding.kind == "noticed"]
        assert told == ["file name without its folder"] * file.startswith("images")


def test_a_python_file_may_name_a_file_in_another_form(tmp_path):
    (tmp_path / f"{NFD}.png").write_text("right")
    (tmp_path / "mine.py").write_text(f"def load_examples(data_dir):\n    yield {NFC + '.png'!r}, 'a dog'\n")
    config = DataConfig(dataset_name=str(tmp_path / "mine.py"), train_data_dir=tmp_path)
    assert [example.read() for example in find_examples(config).examples] == [b"right"]
