"""Tables of the library datasets: parquet, saved datasets, CSV and JSON, with images inside or beside."""

import io
import json
import pickle
import zipfile

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from lora_utils.config.data import DataConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError
from lora_utils.data.images import ImageError
from lora_utils.data.sources import tables


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def png(colour):
    content = io.BytesIO()
    Image.new("RGB", (8, 4), colour).save(content, "PNG")
    return content.getvalue()


RED = png("red")
BLUE = png("blue")
NARUTO = {
    "image": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "b.png"}],
    "text": ["a ninja", "a fox"],
}


def table(columns, **types):
    features = {}
    for name, feature in types.items():
        features[name] = datasets.Value(feature) if isinstance(feature, str) else feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)


def naruto(folder, columns=NARUTO, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    table(columns, image=datasets.Image(), text="string").to_parquet(folder / f"{split}.parquet")
    return folder


def find(name, **settings):
    return find_examples(DataConfig(dataset_name=str(name), **settings))


def contents(found):
    return [(example.source, example.read(), example.captions) for example in found.examples]


def remarks(found):
    return [(finding.kind, finding.source, finding.problem.partition(" (")[0]) for finding in found.findings]


def refusal(name, **settings):
    with pytest.raises(DataError) as error:
        find(name, **settings)
    return str(error.value)


def test_a_dataset_of_images_and_texts_is_found_by_its_types_and_names(tmp_path):
    found = find(naruto(tmp_path / "naruto"), num_repeats=3)
    assert contents(found) == [
        ("naruto[train] row 0", RED, ("a ninja",)),
        ("naruto[train] row 1", BLUE, ("a fox",)),
    ]
    assert found.rule == "images of naruto[train], column image; captions from column text"
    assert [example.repeats for example in found.examples] == [3, 3]
    assert found.findings == []


def test_reading_can_move_to_another_process(tmp_path):
    example = find(naruto(tmp_path / "naruto")).examples[1]
    assert pickle.loads(pickle.dumps(example.read))() == BLUE


def test_saved_datasets_are_loaded_with_or_without_splits(tmp_path):
    dataset = table(NARUTO, image=datasets.Image(), text="string")
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert [content for _, content, _ in contents(find(tmp_path / "one"))] == [RED, BLUE]
    assert contents(find(tmp_path / "two", dataset_split="test")) == [("two[test] row 0", BLUE, ("a fox",))]
    assert "Should be one of ['train', 'test']); set dataset_split" in refusal(
        tmp_path / "two", dataset_split="all"
    )


def test_a_part_of_a_split_can_be_named(tmp_path):
    found = find(naruto(tmp_path / "naruto"), dataset_split="train[1:]")
    assert contents(found) == [("naruto[train[1:]] row 0", BLUE, ("a fox",))]


def test_one_file_is_a_dataset_too(tmp_path):
    file = naruto(tmp_path / "naruto", split="any") / "any.parquet"
    assert [content for _, content, _ in contents(find(file))] == [RED, BLUE]


def test_rows_that_cannot_be_used_are_refused_by_number(tmp_path):
    image = {"bytes": RED, "path": None}
    images = [
        image,
        None,
        image,
        image,
        {"bytes": None, "path": "https://x.org/a.png"},
        {"bytes": b"", "path": None},
    ]
    columns = {"image": images, "text": ["a", "b", None, " ", "c", "d"]}
    folder = tmp_path / "naruto"
    folder.mkdir()
    parquet.write_table(
        pyarrow.table(columns), folder / "train.parquet"
    )  # datasets would ask the address for a size
    found = find(folder)
    assert [example.source for example in found.examples] == ["naruto[train] row 0"]
    assert remarks(found) == [
        ("refused", "naruto[train] row 1", "no image in the row"),
        ("refused", "naruto[train] row 2", "empty caption"),
        ("refused", "naruto[train] row 3", "empty caption"),
        ("refused", "naruto[train] row 4", "address instead of a file"),
        ("refused", "naruto[train] row 5", "no image in the row"),
    ]
    with_prompt = find(folder, instance_prompt="a photo")
    assert [example.captions for example in with_prompt.examples] == [("a",), ("a photo",), ("a photo",)]
    assert with_prompt.rule.endswith("column text, else instance_prompt")


def test_a_list_of_captions_is_several_captions(tmp_path):
    columns = {"img": NARUTO["image"], "captions": [["a ninja", "a boy"], ["a fox"]]}
    table(columns, img=datasets.Image(), captions=[datasets.Value("string")]).to_parquet(
        tmp_path / "x.parquet"
    )
    found = find(tmp_path / "x.parquet")
    assert [example.captions for example in found.examples] == [("a ninja", "a boy"), ("a fox",)]


@pytest.mark.parametrize(
    "wrong", [{"label": [1, 2]}, {"text": [[{"en": "a"}], [{"en": "b"}]]}, {"text": [1, 2]}]
)
def test_a_column_that_is_no_text_is_not_taken_for_captions(tmp_path, wrong):
    table({"image": [RED, BLUE], **wrong}).to_parquet(tmp_path / "x.parquet")
    message = refusal(tmp_path / "x.parquet")
    assert "set caption_column" in message or "caption that is no text" in message


def test_unknown_columns_are_listed_with_an_example_of_each(tmp_path):
    image = datasets.Image()
    columns = {"image": NARUTO["image"], "beschreibung": ["ein Ninja " * 20, "x"], "nr": [7, 8]}
    table(columns, image=image, beschreibung="string", nr="int64").to_parquet(tmp_path / "x.parquet")
    message = refusal(tmp_path / "x.parquet")
    assert "set caption_column to one of its columns, or instance_prompt" in message
    assert "  beschreibung: 'ein Ninja" in message
    assert "  nr: 7" in message
    assert "has no column words; set caption_column" in refusal(
        tmp_path / "x.parquet", caption_column="words"
    )
    assert "has no column words; set image_column" in refusal(tmp_path / "x.parquet", image_column="words")
    assert "set image_column to another" in refusal(
        tmp_path / "x.parquet", image_column="nr", instance_prompt="x"
    )
    found = find(tmp_path / "x.parquet", caption_column="beschreibung")
    assert found.examples[1].captions == ("x",)
    alone = find(tmp_path / "x.parquet", instance_prompt="a photo")
    assert [example.captions for example in alone.examples] == [("a photo",)] * 2
    assert alone.rule.endswith("captions from instance_prompt")


def test_no_column_of_images_is_an_error_with_its_cure(tmp_path):
    table({"text": ["a"], "length": [1]}).to_parquet(tmp_path / "x.parquet")
    assert "set image_column to one of its columns:\n  text: 'a'\n  length: 1" in refusal(
        tmp_path / "x.parquet"
    )


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_file_names_are_relative_to_the_dataset(tmp_path, ending):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(RED)
    (tmp_path / "secret.png").write_bytes(BLUE)
    names = [
        "images/a.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "http://x.org/a.png",
        "absent.png",
    ]
    rows = [{"path": name, "caption": f"number {row}"} for row, name in enumerate(names)]
    lines = [f"{row['path']},{row['caption']}" for row in rows]
    text = "\n".join(["path,caption", *lines]) if ending == "csv" else "\n".join(map(json.dumps, rows))
    (folder / f"train.{ending}").write_text(text)
    found = find(folder)
    assert contents(found) == [("data[train] row 0", RED, ("number 0",))]
    assert [problem for _, _, problem in remarks(found)] == [
        "path out of the folder",
        "file outside of the dataset",
        "address instead of a file",
        "file that cannot be opened",
    ]
    (folder / f"copy.{ending}").write_text(text)
    assert len(find(folder).examples) == 1
    (folder / f"train.{ending}").rename(folder / f"other.{ending}")
    assert "several tables" in refusal(folder)


def test_a_local_folder_of_images_is_read_as_one(tmp_path):
    for name in ("a.png", "a.txt", "metadata.jsonl"):
        (tmp_path / name).write_text('{"file_name": "a.png", "text": "a dog"}')
    assert [(example.source, example.captions) for example in find(tmp_path).examples] == [
        ("a.png", ("a dog",))
    ]
    (tmp_path / "metadata.jsonl").unlink()
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{split}.png").touch()
        (tmp_path / split / f"{split}.txt").write_text(split)
    assert [example.source for example in find(tmp_path).examples] == ["train.png"]
    assert [example.source for example in find(tmp_path, dataset_split="test").examples] == ["test.png"]
    assert "no folder val; set dataset_split" in refusal(tmp_path, dataset_split="val")


def test_packed_images_are_read_and_damaged_ones_are_image_errors(tmp_path):
    rows = "".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in ("a.png", "b.png"))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for name, content in (("a.png", RED), ("b.png", BLUE), ("metadata.jsonl", rows)):
            file.writestr(name, content)
    found = find(tmp_path)
    assert [(example.captions, example.read()) for example in found.examples] == [
        (("a.png",), RED),
        (("b.png",), BLUE),
    ]
    tables._open.cache_clear()
    (tmp_path / "images.zip").write_bytes((tmp_path / "images.zip").read_bytes().replace(BLUE, RED + b"."))
    with pytest.raises(ImageError, match=r"cannot be unpacked.*fetch images\.zip anew"):
        found.examples[1].read()
