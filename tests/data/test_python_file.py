"""The user's own Python file: what it may yield, and what it is told when it yields something else."""

import sys

import pytest
from PIL import Image

from lora_utils.config.data import DataConfig
from lora_utils.data import images
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError


@pytest.fixture
def run(tmp_path):
    """Write load_examples with a body and run it."""

    def run(body, head="from PIL import Image", **settings):
        file = tmp_path / "mine.py"
        file.write_text(f"{head}\ndef load_examples(data_dir):\n    {body}\n")
        return find_examples(DataConfig(dataset_name=str(file), **settings))

    return run


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 4), "red").save(folder / name)
    return folder


def test_paths_bytes_and_pil_images_are_examples(run, data_dir):
    body = """yield data_dir / "a.png", "a dog"
    yield "sub/b.png", ["a cat", "a kitten"]
    yield str(data_dir / "a.png"), "a hound"
    yield (data_dir / "a.png").read_bytes(), "bytes"
    yield Image.new("RGB", (3, 2), "blue"), "PIL"
"""
    found = run(body, train_data_dir=data_dir, num_repeats=2)
    a = (data_dir / "a.png").read_bytes()
    b = (data_dir / "sub/b.png").read_bytes()
    assert [(example.source, example.captions) for example in found.examples] == [
        ("a.png", ("a dog",)),
        ("sub/b.png", ("a cat", "a kitten")),
        ("a.png (example 3 of mine.py)", ("a hound",)),
        ("example 4 of mine.py", ("bytes",)),
        ("example 5 of mine.py", ("PIL",)),
    ]
    assert [example.read() for example in found.examples[:4]] == [a, b, a, a]
    assert images.decode(found.examples[4].read()).image.size == (3, 2)
    assert {example.repeats for example in found.examples} == {2}
    assert found.rule == "images and captions from mine.py, load_examples(data_dir)"


def test_the_turn_that_exif_asks_for_survives(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    found = run(f'yield Image.open({str(tmp_path / "turned.jpg")!r}), "x"')
    assert images.decode(found.examples[0].read()).image.size == (20, 40)


def test_without_train_data_dir_the_file_gets_none(run):
    assert run('yield Image.new("L", (1, 1)), str(data_dir)').examples[0].captions == ("None",)


def test_images_and_captions_that_cannot_be_used_are_refused_by_name(run, data_dir):
    body = """yield "a.png", "a dog"
    yield "absent.png", "x"
    yield "photo.heic", "x"
    yield "sub/b.png", " "
"""
    found = run(body, train_data_dir=data_dir)
    assert [(finding.kind, finding.source) for finding in found.findings] == [
        ("refused", "absent.png"),
        ("refused", "photo.heic"),
        ("refused", "sub/b.png"),
    ]
    assert len(run(body, train_data_dir=data_dir, instance_prompt="a photo").examples) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 7", "returns int 7; let it yield"),
        ("return None", "returns NoneType None"),
        ('yield "a.png"', "example 1 of mine.py is str 'a.png'; yield"),
        ('yield "a.png", "x"; yield "a.png", "x", 3', "example 2 of mine.py is tuple"),
        ('yield "a.png", 7', "example 1 of mine.py: the caption is int 7; yield a string"),
        ('yield "a.png", ["x", None]', "the caption is list"),
        ('yield {"a": 1}, "x"', "example 1 of mine.py: the image is dict"),
        ('yield b"", "x"', "the image is bytes"),
        ('yield "https://x.org/a.png", "x"', "is an address; download"),
        ('yield Image.new("CMYK", (1, 1)), "x"', "example 1 of mine.py: the PIL image of mode CMYK"),
        ("return []", "there are no images and captions from mine.py"),
    ],
)
def test_what_the_file_may_not_yield_is_named_with_its_position(run, data_dir, body, message):
    with pytest.raises(DataError) as error:
        run(body, train_data_dir=data_dir)
    assert message in str(error.value)


def test_a_relative_path_needs_train_data_dir(run):
    with pytest.raises(DataError, match=r"example 1 of mine\.py: a\.png is relative; set train_data_dir"):
        run('yield "a.png", "x"')


def test_a_file_without_the_function_is_an_error_with_its_cure(run, tmp_path, data_dir):
    file = tmp_path / "other.py"
    with pytest.raises(DataError, match="there is no file"):
        find_examples(DataConfig(dataset_name=str(file)))
    file.write_text("load_examples = 3")
    with pytest.raises(DataError, match=r"no function load_examples\(data_dir\); define it"):
        find_examples(DataConfig(dataset_name=str(file)))
    file.write_text("def load_examples(): yield 'a.png', 'x'")
    with pytest.raises(
        DataError, match=r"too many positional arguments.*define it as load_examples\(data_dir\)"
    ):
        find_examples(DataConfig(dataset_name=str(file)))
    with pytest.raises(DataError, match="gets one folder"):
        run("yield", train_data_dir=[data_dir, tmp_path])
    with pytest.raises(DataError, match="set train_data_dir to the folder"):
        run("yield", train_data_dir=tmp_path / "absent")


def test_errors_of_the_file_itself_stay_what_they_are(run):
    with pytest.raises(ZeroDivisionError):
        run("yield 1 / 0")
    with pytest.raises(TypeError, match="own"):
        run('raise TypeError("own")')
    with pytest.raises(SyntaxError):
        run("yield (")


def test_an_edited_file_is_run_anew_and_leaves_nothing_behind(run, tmp_path):
    before = set(sys.modules)
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom PIL import Image\n"
    head += "@dataclass\nclass Label:\n    text: str"
    body = 'yield Image.new("L", (1, 1)), Label("{}").text'
    assert [run(body.format(word), head).examples[0].captions for word in ("a", "b")] == [("a",), ("b",)]
    assert not any("own_dataset_" in name for name in set(sys.modules) - before)
    assert not (tmp_path / "__pycache__").exists()
