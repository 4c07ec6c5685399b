"""Folders of images: what is found, and what is said about what is left out."""

import os

import pytest

from lora_utils.config.data import DataConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError
from lora_utils.data.findings import table
from lora_utils.data.images import ImageError


def fill(folder, *names, caption="a dog"):
    """Pictures, and captions where there are to be some."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
    return folder


def find(*folders, **settings):
    return find_examples(DataConfig(train_data_dir=list(folders) or None, **settings))


def sources(found):
    return [example.source for example in found.examples]


def remarks(found):
    return [(finding.kind, finding.source, finding.problem.partition(" (")[0]) for finding in found.findings]


# Folders


def test_nested_folders_are_read_in_the_order_of_their_names(tmp_path):
    fill(tmp_path, "b.png", "a.JPG", "sub/deeper/c.webp", "a/z.jpeg")
    found = find(tmp_path)
    assert sources(found) == ["a.JPG", "a/z.jpeg", "b.png", "sub/deeper/c.webp"]
    assert [example.read() for example in found.examples] == [source.encode() for source in sources(found)]
    assert found.findings == []
    assert found.rule == f"images of {tmp_path}; captions from .txt files beside the images"


def test_several_folders_have_repeats_of_their_own(tmp_path):
    fill(tmp_path / "cats", "a.png", caption="a cat")
    fill(tmp_path / "more" / "dogs", "a.png")
    folders = tmp_path / "cats", tmp_path / "more" / "dogs"
    found = find(*folders, num_repeats=[3, 2])
    assert [(example.source, example.captions, example.repeats) for example in found.examples] == [
        ("cats/a.png", ("a cat",), 3),
        ("dogs/a.png", ("a dog",), 2),
    ]
    assert [example.repeats for example in find(*folders, num_repeats=5).examples] == [5, 5]


def test_a_folder_given_twice_or_inside_another_counts_once(tmp_path):
    fill(tmp_path, "a.png", "sub/b.png")
    found = find(tmp_path, tmp_path / "sub", tmp_path / "sub" / "..", num_repeats=[1, 7, 9])
    assert [(example.source.rpartition("/")[2], example.repeats) for example in found.examples] == [
        ("a.png", 1),
        ("b.png", 7),
    ]
    assert [problem for _, _, problem in remarks(found)] == [
        "folder that is given twice",
        "folder inside another one",
    ]


def test_equal_folder_names_are_told_apart(tmp_path):
    fill(tmp_path / "x" / "img", "a.png")
    fill(tmp_path / "y" / "img", "a.png")
    found = find(tmp_path / "x" / "img", tmp_path / "y" / "img")
    assert sources(found) == [f"{tmp_path}/x/img/a.png", f"{tmp_path}/y/img/a.png"]


def test_hidden_files_are_passed_over(tmp_path):
    fill(tmp_path, "a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png")
    found = find(tmp_path)
    assert sources(found) == ["a.png"]
    assert found.findings == []


def test_what_is_no_usable_image_is_named(tmp_path):
    fill(tmp_path, "a.png", "layers.PSD", "10_dog/b.png", "a.jpg", "lonely.png", caption="a dog")
    (tmp_path / "lonely.png").unlink()
    for name in ("notes.md", "data.json", "x/Thumbs.db"):
        fill(tmp_path, name, caption=None)
    found = find(tmp_path)
    assert sources(found) == ["10_dog/b.png", "a.jpg", "a.png"]
    assert remarks(found) == [
        ("noticed", "10_dog", "folder name with repeats"),
        ("refused", "layers.PSD", "kind of picture that cannot be read"),
        ("noticed", tmp_path.name, "neither image nor caption"),
        ("noticed", "a.txt", "images that share a caption file"),
        ("noticed", "lonely.txt", "caption without image"),
    ]
    assert found.findings[1].action == "save it as PNG or JPEG"


def test_links_and_pipes_are_refused_by_name(tmp_path):
    fill(tmp_path / "elsewhere", "secret.png")
    folder = fill(tmp_path / "data", "a.png", "inside.png", "link.png", "broken.png", "pipe.png")
    for name, target in (("inside", "a.png"), ("link", "../elsewhere/secret.png"), ("broken", "nowhere.png")):
        (folder / f"{name}.png").unlink()
        (folder / f"{name}.png").symlink_to(target)
    (folder / "pipe.png").unlink()
    os.mkfifo(folder / "pipe.png")
    (folder / "sub").symlink_to("../elsewhere")
    found = find(folder)
    assert sources(found) == ["a.png", "inside.png"]
    assert found.examples[1].read() == b"a.png"
    assert remarks(found) == [
        ("refused", "sub", "link to a folder"),
        ("refused", "broken.png", "link that leads to no file"),
        ("refused", "link.png", "link out of the folder"),
        ("refused", "pipe.png", "not a regular file"),
    ]


def test_a_snapshot_in_the_cache_of_the_hub_may_link_to_its_blobs(tmp_path):
    fill(tmp_path / "datasets--u--n" / "blobs", "0123", caption=None)
    folder = fill(tmp_path / "datasets--u--n" / "snapshots" / "1", "a.png")
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to("../../blobs/0123")
    assert find(folder).examples[0].read() == b"0123"


def test_names_that_cannot_be_shown_are_refused(tmp_path):
    fill(tmp_path, "Screenshot at 1.00\u202fPM.png", "two\nlines.png", "\x1b[2J.png")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    (tmp_path / os.fsdecode(b"\xfe")).mkdir()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "\\ud83d\\n.png", "text": "x"}')
    found = find(tmp_path)
    assert sources(found) == ["Screenshot at 1.00\u202fPM.png"]
    assert [source for severity, source, _ in remarks(found) if severity == "refused"] == [
        "\\udcfe",
        *("\\x1b[2J.png", "\\x1b[2J.txt", "two\\nlines.png", "two\\nlines.txt", "\\udcff.png"),
        "metadata.jsonl line 1",
    ]
    assert str(found.findings).isprintable()
    table(found.findings).encode()


def test_a_folder_that_cannot_be_used_is_an_error_with_its_cure(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*absent; set train_data_dir"):
        find(tmp_path / "absent")
    with pytest.raises(DataError, match=r"there are no images of .*; put images there"):
        find(tmp_path)
    fill(tmp_path, "pictures.zip", caption=None)
    with pytest.raises(
        DataError, match=r"put images there(.|\n)*neither image nor caption \(1 file: \.zip\)"
    ):
        find(tmp_path)
    with pytest.raises(DataError, match="is a file; unpack it"):
        find(tmp_path / "pictures.zip")
    with pytest.raises(DataError, match="neither train_data_dir nor dataset_name is set"):
        find()
    with pytest.raises(DataError, match="set one of both"):
        find(tmp_path, dataset_name="some/dataset")


def test_when_no_image_has_a_caption_each_is_named_with_its_cure(tmp_path):
    fill(tmp_path, "none.png", caption=None)
    fill(tmp_path, "empty.png", caption=" ")
    fill(tmp_path, "latin.png").joinpath("latin.txt").write_bytes(b"\xe9")
    with pytest.raises(DataError, match="none of the images") as error:
        find(tmp_path)
    assert all(
        name in str(error.value) for name in ("none.png", "none.txt", "empty.txt", "save latin.txt as UTF-8")
    )
    assert "or set instance_prompt" in str(error.value)
    fill(tmp_path, "latin.png")
    found = find(tmp_path, instance_prompt="a photo")
    assert [example.captions for example in found.examples] == [("a photo",), ("a dog",), ("a photo",)]


def test_a_file_that_changes_after_it_was_found_is_an_image_error(tmp_path):
    fill(tmp_path, "a.png")
    found = find(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError):
        found.examples[0].read()


def test_trigger_without_trigger_word_is_noticed_once(tmp_path):
    fill(tmp_path, "a.png", "b.png", caption="a [trigger]")
    assert remarks(find(tmp_path)) == [("noticed", "a.png and 1 more", "[trigger] without trigger_word")]
    assert remarks(find(tmp_path, trigger_word="sks")) == []


# Masks


def test_masks_are_found_by_name(tmp_path):
    folder = fill(tmp_path / "data", "sub/a.jpg", "b.png", "c.png", "c.jpg")
    masks = fill(folder / "masks", "sub/a.png", "c.jpg", "c.png", "z.png", caption=None)
    found = find(folder, mask_data_dir=masks)
    read = {example.source: example.read_mask and example.read_mask() for example in found.examples}
    assert read == {"sub/a.jpg": b"sub/a.png", "b.png": None, "c.png": b"c.png", "c.jpg": b"c.jpg"}
    assert remarks(found) == [
        ("noticed", "b.png", "no mask"),
        ("noticed", "c.txt", "images that share a caption file"),
        ("noticed", "masks/z.png", "mask without image"),
    ]


def test_masks_that_cannot_be_used_are_an_error(tmp_path):
    folder = fill(tmp_path / "data", "a.png")
    with pytest.raises(DataError, match="set mask_data_dir"):
        find(folder, mask_data_dir=tmp_path / "absent")
    with pytest.raises(DataError, match=r"no mask in .* is named like an image"):
        find(folder, mask_data_dir=fill(tmp_path / "masks", "mask_of_a.png", caption=None))
    with pytest.raises(DataError, match="folder of their own"):
        find(folder, mask_data_dir=folder)
    with pytest.raises(DataError, match="masks need a folder"):
        find(dataset_name="some/dataset", mask_data_dir=tmp_path / "masks")
