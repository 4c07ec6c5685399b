"""Every type that Arrow has for text and bytes, as captions and as images, through every door."""

import datasets
import pyarrow
import pytest
from pyarrow import ipc, parquet

from lora_utils.config.data import DataConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError
from lora_utils.data.sources.arrow_types import binary_lengths, plain_copy, plain_type
from tests.data.image_corpus import PICTURE, save

RED = save(PICTURE)
BLUE = save(PICTURE[::-1, :20])
CAPTIONS = ["a ninja", None, "a fox", "a boat"]
IMAGES = [RED, RED, None, BLUE]
USED = [(RED, ("a ninja",)), (BLUE, ("a boat",))]
"""Row 1 lacks its caption, row 2 its image."""
NAMES = ["a.png", "a.png", None, "b.png"]
DOORS = ["file", "folder", "stream", "ipc"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def coded(values, data_type):
    indices = pyarrow.array(
        [None if value is None else row for row, value in enumerate(values)], pyarrow.int8()
    )
    filled = [value or values[0] for value in values]
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(filled, data_type))


def extension(values, data_type):
    kind = pyarrow.opaque(data_type, "thing", "somebody")
    return pyarrow.ExtensionArray.from_storage(kind, pyarrow.array(values, data_type))


def structs(bytes_type, path_type):
    kind = pyarrow.struct([("bytes", bytes_type), ("path", path_type)])
    return pyarrow.array([image and {"bytes": image, "path": None} for image in IMAGES], kind)


def listed(kind, text=None):
    cells = [caption and [caption] for caption in CAPTIONS]
    return pyarrow.array(cells, kind(text or pyarrow.string()))


def texts(values):
    return {
        "string": pyarrow.array(values),
        "large_string": pyarrow.array(values, pyarrow.large_string()),
        "string_view": pyarrow.array(values, pyarrow.string_view()),
        "dictionary": coded(values, pyarrow.string()),
        "dictionary of large strings": coded(values, pyarrow.large_string()),
        "dictionary of views": coded(values, pyarrow.string_view()),
        "extension": extension(values, pyarrow.string()),
        "extension of views": extension(values, pyarrow.string_view()),
        "run ends": pyarrow.RunEndEncodedArray.from_arrays(
            pyarrow.array(range(1, len(values) + 1), pyarrow.int32()), pyarrow.array(values)
        ),
    }


LISTS = {
    "list": listed(pyarrow.list_),
    "list of views": listed(pyarrow.list_, pyarrow.string_view()),
    "large list": listed(pyarrow.large_list),
    "list view": listed(pyarrow.list_view),
    "list view of views": listed(pyarrow.list_view, pyarrow.string_view()),
    "large list view": listed(pyarrow.large_list_view),
    "fixed list": listed(lambda text: pyarrow.list_(text, 1)),
}
BINARIES = {
    "binary": pyarrow.array(IMAGES),
    "large_binary": pyarrow.array(IMAGES, pyarrow.large_binary()),
    "binary_view": pyarrow.array(IMAGES, pyarrow.binary_view()),
    "dictionary": coded(IMAGES, pyarrow.binary()),
    "extension": extension(IMAGES, pyarrow.binary()),
    "extension of views": extension(IMAGES, pyarrow.binary_view()),
    "struct": structs(pyarrow.binary(), pyarrow.string()),
    "struct of large ones": structs(pyarrow.large_binary(), pyarrow.large_string()),
    "struct of views": structs(pyarrow.binary_view(), pyarrow.string_view()),
    "struct with a view of bytes": structs(pyarrow.binary_view(), pyarrow.string()),
    "struct with a view of names": structs(pyarrow.binary(), pyarrow.string_view()),
}


def write(folder, door, columns):
    """The table, and what dataset_name is then."""
    table = pyarrow.table(columns)
    folder.mkdir()
    if door in ("file", "folder"):
        parquet.write_table(table, folder / "train.parquet")
        return folder / "train.parquet" if door == "file" else folder
    file = folder / "train.arrow"
    with (ipc.new_stream if door == "stream" else ipc.new_file)(str(file), table.schema) as writer:
        writer.write_table(table)
    return file


def examples(**settings):
    found = find_examples(DataConfig(**settings))
    return [(example.read(), example.captions) for example in found.examples]


def can_be_written(door, name):
    """pyarrow writes neither to parquet, and cannot read the one again that it writes."""
    return door in ("stream", "ipc") or name not in ("run ends", "dictionary of views")


CAPTION_CASES = [
    (door, name) for door in DOORS for name in (*texts(CAPTIONS), *LISTS) if can_be_written(door, name)
]
NAME_CASES = [(door, name) for door in DOORS for name in texts(NAMES) if can_be_written(door, name)]


@pytest.mark.parametrize(("door", "name"), CAPTION_CASES)
def test_captions_of_every_type_are_read(tmp_path, door, name):
    captions = (texts(CAPTIONS) | LISTS)[name]
    dataset = write(tmp_path / "data", door, {"image": BINARIES["binary"], "text": captions})
    assert examples(dataset_name=str(dataset)) == USED


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", BINARIES)
def test_images_of_every_type_are_read(tmp_path, door, name):
    dataset = write(tmp_path / "data", door, {"image": BINARIES[name], "text": CAPTIONS})
    assert examples(dataset_name=str(dataset)) == USED


@pytest.mark.parametrize(("door", "name"), NAME_CASES)
def test_names_of_files_of_every_type_are_read(tmp_path, door, name):
    dataset = write(tmp_path / "data", door, {"file_name": texts(NAMES)[name], "text": CAPTIONS})
    for file, content in (("a.png", RED), ("b.png", BLUE)):
        (tmp_path / "data" / file).write_bytes(content)
    if door == "folder":  # beside images, such a table is metadata or is named itself
        dataset = dataset / "train.parquet"
    assert examples(dataset_name=str(dataset)) == USED


@pytest.mark.parametrize(
    "name", [name for name in (*texts(CAPTIONS), *LISTS) if can_be_written("file", name)]
)
def test_metadata_of_every_type_is_read(tmp_path, name):
    captions = (texts(CAPTIONS) | LISTS)[name]
    names = ["a.png", "c.png", "d.png", "b.png"]
    for file, content in zip(names, (RED, RED, RED, BLUE), strict=True):
        (tmp_path / file).write_bytes(content)
    parquet.write_table(pyarrow.table({"file_name": names, "text": captions}), tmp_path / "metadata.parquet")
    assert [captions for _, captions in examples(train_data_dir=[tmp_path])] == [
        ("a ninja",),
        ("a boat",),
        ("a fox",),
    ]


@pytest.mark.parametrize("name", ["binary", "binary_view", "struct of views", "extension of views"])
def test_a_part_of_a_table_is_its_own_rows(tmp_path, name):
    dataset = write(tmp_path / "data", "file", {"image": BINARIES[name], "text": CAPTIONS})
    assert examples(dataset_name=str(dataset), dataset_split="train[1:]") == USED[1:]


@pytest.mark.parametrize("values", [IMAGES, [None], [b""], [b"1" * 12, b"1" * 13, b""] * 9, []])
def test_lengths_of_views_are_those_of_the_values(values):
    whole = pyarrow.chunked_array([pyarrow.array(values, pyarrow.binary_view())] * 2)
    for part in (whole, whole.slice(1), whole.slice(0, 1)):
        assert binary_lengths(part) == [
            value and len(value) if value else (None if value is None else 0) for value in part.to_pylist()
        ]


OTHERS = {
    "embedding": pyarrow.array([[0.5, 1.5], None, [], [2.5]], pyarrow.list_view(pyarrow.float32())),
    "id": pyarrow.ExtensionArray.from_storage(
        pyarrow.uuid(), pyarrow.array([bytes(16)] * 4, pyarrow.binary(16))
    ),
    "flag": extension([True, None, False, True], pyarrow.bool_()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_column_that_nobody_asks_for_costs_no_table(tmp_path, name):
    columns = {"image": BINARIES["binary"], "text": CAPTIONS, name: OTHERS[name]}
    assert examples(dataset_name=str(write(tmp_path / "data", "folder", columns))) == USED


def test_a_folder_keeps_its_splits_and_is_copied_once_for_each_state(tmp_path, cache):
    folder = write(tmp_path / "data", "folder", {"image": BINARIES["binary"], "text": LISTS["list view"]})
    parquet.write_table(pyarrow.table({"image": [BLUE], "text": [["a test"]]}), folder / "test.parquet")
    assert examples(dataset_name=str(folder)) == USED
    assert examples(dataset_name=str(folder), dataset_split="test") == [(BLUE, ("a test",))]
    copies = list(cache.glob("plain_types/*"))
    assert [sorted(path.name for path in copy.iterdir()) for copy in copies] == [
        ["test.parquet", "train.parquet"]
    ]
    parquet.write_table(pyarrow.table({"image": [RED], "text": [["a change"]]}), folder / "test.parquet")
    assert examples(dataset_name=str(folder), dataset_split="test") == [(RED, ("a change",))]


def test_plain_tables_and_damaged_ones_are_not_copied(tmp_path, cache):
    folder = write(tmp_path / "data", "folder", {"image": BINARIES["binary_view"], "text": CAPTIONS})
    assert plain_copy(folder, cache) == folder
    (folder / "train.parquet").write_bytes(b"PAR1 and then nothing")
    assert plain_copy(folder, cache) == folder
    with pytest.raises(DataError, match="check its files, or fetch them anew"):
        examples(dataset_name=str(folder))
    assert list(cache.glob("plain_types/*")) == []


def test_plain_types_hold_the_same_and_are_plain_themselves():
    arrays = [*texts(CAPTIONS).values(), *LISTS.values(), *BINARIES.values(), *OTHERS.values()]
    assert len(arrays) > 25
    for array in arrays:
        plain = plain_type(array.type)
        assert plain_type(plain) == plain
        assert not any(word in str(plain) for word in ("view", "extension", "dictionary", "run_end"))
