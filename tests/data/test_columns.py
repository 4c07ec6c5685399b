"""Which column is learned: names first, then types, then a question that shows every column."""

import io

import datasets
import pytest
from PIL import Image

from lora_utils.config.data import DataConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError
from lora_utils.data.sources.columns import choose_caption_column, choose_image_column


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


PICTURE = {"bytes": b"x", "path": None}
ASK = "could be the images"
# Columns with a value of each; a star marks those whose type is Image.
IMAGE_COLUMNS = {
    "*mask *image": "image",
    "*conditioning_image *image": "image",
    "*thumbnail *image text": "image",
    "*mask *img": "img",
    "*mask *Image": "Image",
    "*target": "target",
    "*mask": "mask",
    "*image *img *jpg": "image",
    "*jpg *png": ASK,
    "*conditioning_image *target": ASK,
    "*input *edited": ASK,
    "*mask *control": ASK,
    "*image path=/raw/a.png": "image",
    "*pixels path=/raw/a.png": "pixels",
    "*pixels file_name=a.png": "pixels",
    "*mask file_name=a.png": ASK,
    "*mask image=a.png": "image",
    "*mask image=https://x.org/a": "mask",
    "file_name=a.png image=b.png": "file_name",
    "image=a.png path=/raw/a.png": "image",
    "image=a.png conditioning_image=b.png": "image",
    "filename=a.png image_path=b/a.png": ASK,
    "path=7 filename=a.png": "filename",
    "nr=7 text=a": None,
}


@pytest.mark.parametrize("columns", IMAGE_COLUMNS)
def test_the_column_of_images_is_found_by_name_then_by_type_or_asked_for(columns):
    right = IMAGE_COLUMNS[columns]
    examples = {}
    for column in columns.split():
        name, _, value = column.partition("=")
        examples[name.lstrip("*")] = PICTURE if name.startswith("*") else value or "a"
    typed = [column[1:] for column in columns.split() if column.startswith("*")]
    if right != ASK:
        assert choose_image_column(None, examples, typed, "x") == right
        return
    with pytest.raises(DataError, match=f"{ASK}.*; set image_column to one of its columns") as error:
        choose_image_column(None, examples, typed, "x")
    assert all(f"\n  {name}: " in str(error.value) for name in examples)
    chosen = list(examples)[-1]
    assert choose_image_column(chosen, examples, typed, "x") == chosen


@pytest.mark.parametrize(
    ("examples", "right"),
    [
        ({"text": "a dog"}, "text"),
        ({"id": 7, "Prompt": "a dog"}, "Prompt"),
        ({"text": 7, "caption": "a dog"}, "caption"),
        ({"text": None, "caption": ["a dog", "a hound"]}, "caption"),
        ({"tags": 7}, "tags"),
        ({"title": "a dog"}, None),
        ({"text": "a dog", "tags": "dog, red"}, "2 columns that could be the captions (text, tags)"),
        ({"caption": "a", "prompt": "b", "description": "c"}, "3 columns that could be the captions"),
        ({"text": "a", "Text": "b"}, "2 columns that could be the captions"),
    ],
)
def test_the_column_of_captions_is_the_only_one_that_is_called_so(examples, right):
    if right is None or right in examples:
        assert choose_caption_column(None, examples, "x") == right
        return
    with pytest.raises(DataError) as error:
        choose_caption_column(None, examples, "x")
    assert right in str(error.value)
    assert all(f"\n  {name}: {value!r}" in str(error.value) for name, value in examples.items())
    assert "instance_prompt" not in str(error.value)  # which would not answer the question


def png(colour):
    content = io.BytesIO()
    Image.new("RGB", (8, 4), colour).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def test_a_mask_before_the_image_is_not_learned_and_is_told(tmp_path):
    features = {"mask": datasets.Image(), "image": datasets.Image(), "text": datasets.Value("string")}
    columns = {"mask": [png("white")], "image": [png("red")], "text": ["a dog"]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(tmp_path / "x")
    found = find_examples(DataConfig(dataset_name=str(tmp_path / "x")))
    assert [example.read() for example in found.examples] == [png("red")["bytes"]]
    assert "column image;" in found.rule
    assert [(finding.source, finding.problem) for finding in found.findings] == [
        ("x[train] mask", "another column of images")
    ]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_of_files_asks_which_captions_are_meant(tmp_path, name):
    (tmp_path / "a.png").touch()
    rows = {"metadata.csv": "file_name,text,tags\na.png,a dog,dog", "metadata.jsonl": None}
    text = rows[name] or '{"file_name": "a.png", "text": "a dog", "tags": "dog"}'
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"\(text, tags\); set caption_column"):
        find_examples(DataConfig(train_data_dir=tmp_path))
    found = find_examples(DataConfig(train_data_dir=tmp_path, caption_column="tags"))
    assert found.examples[0].captions == ("dog",)
