"""Folders as other programs and systems leave them: what is learned with which caption, and what is told.

No picture is real: none is opened.
"""

import unicodedata
from dataclasses import dataclass, field

import pytest

from lora_utils.config.data import DataConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError

NFC = unicodedata.normalize("NFC", "é")
NFD = unicodedata.normalize("NFD", "é")
NO_CAPTION = "refused: no caption"
SIDECAR = "noticed: file of another program beside an image"
ENDING = "noticed: caption file that is no .txt"
SECOND = "noticed: second caption file of an image"
MASK = "noticed: mask beside its image"
LONELY = "noticed: caption without image"
STRAY = "noticed: neither image nor caption"
BESIDES = "noticed: table besides the captions"
UNUSED = "noticed: table that is not used"
NAMELESS = "noticed: metadata without a column file_name"
OTHER = "noticed: table without an image that needs a caption"
WITHOUT_FOLDER = "noticed: file name without its folder"
TWINS = "noticed: name that looks like another"
SHARED = "noticed: images that share a caption file"
ROW = "file_name,text\na.png,a dog\n"


@dataclass(frozen=True)
class Layout:
    """Files, and what must become of them."""

    files: dict[str, str]
    captions: dict[str, str]
    """The caption of every image that is learned."""
    remarks: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    folder: str = "."
    """The train_data_dir."""


def images(*names, **captions):
    """Pictures with a caption file each, besides those that are named."""
    return {f"{name}.png": "" for name in names} | {f"{name}.txt": text for name, text in captions.items()}


A = {"a.png": "", "a.txt": "a dog"}
DOG = {"a.png": "a dog"}
IN_IMAGES = {"images/a.png": "a dog"}

CAPTION_FILES = {
    "sd-scripts": Layout({"a.png": "", "a.caption": "a dog"}, DOG, (ENDING,)),
    "a tagger": Layout({"a.png": "", "a.tags": "dog, red"}, {"a.png": "dog, red"}, (ENDING,)),
    "another tagger": Layout({"a.png": "", "a.CAP": "a dog"}, DOG, (ENDING,)),
    "text before tags": Layout(A | {"a.tags": "dog", "a.caption": "x"}, DOG, (SECOND, SECOND)),
    "tags that are asked for": Layout(
        A | {"a.tags": "dog"}, {"a.png": "dog"}, (STRAY,), {"caption_extension": "tags"}
    ),
    "an ending of two parts": Layout(
        A | {"a.wd14.txt": "dog"}, {"a.png": "dog"}, (STRAY,), {"caption_extension": ".wd14.txt"}
    ),
    "the whole name and .txt": Layout({"a.jpg": "", "a.jpg.txt": "a dog"}, {"a.jpg": "a dog"}),
    "whole names tell pictures apart": Layout(
        {"a.jpg": "", "a.png": "", "a.jpg.txt": "a dog", "a.png.txt": "a cat"},
        {"a.jpg": "a dog", "a.png": "a cat"},
    ),
    "the whole name before the stem": Layout(A | {"a.png.txt": "a cat"}, {"a.png": "a cat"}, (SECOND,)),
    "small letters before capitals": Layout(A | {"a.TXT": "x"}, DOG, (SECOND,)),
    "several endings in a folder": Layout(
        A | {"b.png": "", "b.caption": "a cat"}, DOG | {"b.png": "a cat"}, (ENDING,)
    ),
    "caption of no image": Layout(A | {"b.caption": "x"}, DOG, (LONELY,)),
}

SIDECARS = {
    "caches of sd-scripts": Layout(
        A | {"a.npz": "", "a_sdxl.npz": "", "a_1024x1024_sdxl.npz": ""}, DOG, (SIDECAR,)
    ),
    "answers and workflows": Layout(A | {"a.json": "{}", "a.png.json": "{}"}, DOG, (SIDECAR,)),
    "JSON and .info": Layout(A | {"a.json": "{}", "a.civitai.info": "{}"}, DOG, (SIDECAR, SIDECAR)),
    "nothing of an image": Layout(
        A | {"workflow.json": "", "dataset.toml": "", "LICENSE": ""}, DOG, (STRAY,)
    ),
    "JSON alone": Layout(
        {"a.png": "", "a.json": "{}"} | images(b="x") | {"b.png": ""}, {"b.png": "x"}, (NO_CAPTION, SIDECAR)
    ),
    "mask of OneTrainer": Layout(A | {"a-masklabel.png": ""}, DOG, (MASK,)),
    "condition of OneTrainer": Layout(A | {"a-condlabel.png": ""}, DOG, (MASK,)),
    "masks beside": Layout(
        A | {"a_mask.png": "", "b.png": "", "b.mask.jpg": "", "b.txt": "b"}, DOG | {"b.png": "b"}, (MASK,)
    ),
    "mask of a photo": Layout({"a.jpg": "", "a_Mask.png": "", "a.txt": "a dog"}, {"a.jpg": "a dog"}, (MASK,)),
    "masks below": Layout(A | {"masks/a.png": ""}, DOG, (MASK,)),
    "masks beside images": Layout(
        {"images/a.png": "", "images/a.txt": "a dog", "masks/a.png": ""}, IN_IMAGES, (MASK,)
    ),
    "controls of ai-toolkit": Layout(A | {"_controls/a.png": ""}, DOG, (MASK,)),
    "masks, all with one prompt": Layout(
        {"a.png": "", "a_mask.png": ""},
        {"a.png": "x"},
        (MASK, "noticed: no caption"),
        {"instance_prompt": "x"},
    ),
    "a mask of no image": Layout({"a_mask.png": "", "a_mask.txt": "a mask"}, {"a_mask.png": "a mask"}),
    "a mask with a caption": Layout(
        A | {"a_mask.png": "", "a_mask.txt": "a mask"},
        DOG | {"a_mask.png": "a mask"},
        ("noticed: name like that of a mask",),
    ),
}

TABLES = {
    "no table of files": Layout(A | {"notes.csv": "date,note\n1,x\n"}, DOG, (BESIDES,)),
    "metadata about other things": Layout(A | {"metadata.csv": "id,score\n1,2\n"}, DOG, (NAMELESS,)),
    "metadata of a sub-folder about other things": Layout(
        A | {"more/b.png": "", "more/b.txt": "b", "more/metadata.jsonl": '{"seed": 1}'},
        DOG | {"more/b.png": "b"},
        (NAMELESS,),
    ),
    "results": Layout(A | {"results.csv": "image,prompt,score\na.png,x,1\n"}, DOG, (BESIDES,)),
    "a damaged table": Layout(
        A | {"notes.csv": '"', "b.png": "", "log.jsonl": "{"}, DOG, (NO_CAPTION, OTHER, OTHER)
    ),
    "notes, and captions lack": Layout(
        A | {"b.png": "", "notes.csv": "date,note\n1,x\n"}, DOG, (NO_CAPTION, UNUSED)
    ),
    "results of other images": Layout(
        A | {"b.png": "", "results.csv": "image,prompt\nout.png,x\n"}, DOG, (NO_CAPTION, OTHER)
    ),
    "captions.csv": Layout({"a.png": "", "captions.csv": ROW}, DOG),
    "any name": Layout({"a.png": "", "mine.tsv": "image\tcaption\na.png\ta dog\n"}, DOG),
    "lines of JSON": Layout({"a.png": "", "mine.jsonl": '{"image": "a.png", "prompt": "a dog"}'}, DOG),
    "a table before the prompt": Layout(
        {"a.png": "", "captions.csv": ROW}, DOG, (), {"instance_prompt": "x"}
    ),
    "a file before the table": Layout(
        A | {"b.png": "", "captions.csv": "file_name,text\na.png,x\nb.png,a cat"}, DOG | {"b.png": "a cat"}
    ),
    "metadata before a table": Layout(
        {"a.png": "", "metadata.csv": ROW, "captions.csv": "file_name,text\na.png,x"}, DOG, (BESIDES,)
    ),
    "captions.csv beside images/": Layout(
        {"images/a.png": "", "captions.csv": ROW}, IN_IMAGES, (WITHOUT_FOLDER,)
    ),
    "metadata.csv beside images/": Layout(
        {"images/a.png": "", "metadata.csv": ROW}, IN_IMAGES, (WITHOUT_FOLDER,)
    ),
    "names with the folder": Layout(
        {"images/a.png": "", "captions.csv": "file_name,text\nimages/a.png,a dog"}, IN_IMAGES
    ),
    "above the folder": Layout(
        {"images/a.png": "", "captions.csv": ROW}, DOG, (WITHOUT_FOLDER,), {}, "images"
    ),
    "metadata above the folder": Layout(
        {"images/a.png": "", "metadata.jsonl": '{"file_name": "images/a.png", "text": "a dog"}'},
        DOG,
        (),
        {},
        "images",
    ),
    "above, in a sub-folder": Layout(
        {"images/x/a.png": "", "captions.csv": ROW}, {"x/a.png": "a dog"}, (WITHOUT_FOLDER,), {}, "images"
    ),
    "above, but not needed": Layout(
        {"images/a.png": "", "images/a.txt": "a cat", "captions.csv": ROW},
        {"a.png": "a cat"},
        (),
        {},
        "images",
    ),
    "above, of others": Layout(
        {"images/a.png": "", "images/b.png": "", "images/b.txt": "b", "captions.csv": "image,text\nc.png,x"},
        {"b.png": "b"},
        (NO_CAPTION, OTHER),
        {},
        "images",
    ),
    "a name in two folders": Layout(
        {"x/a.png": "", "y/a.png": "", "y/a.txt": "y", "metadata.csv": ROW},
        {"y/a.png": "y"},
        ("refused: row that fits several images", "refused: no row in metadata.csv"),
    ),
}

LOOKALIKES = {
    "caption": Layout({f"{NFD}.png": "", f"{NFC}.txt": "a"}, {f"{NFD}.png": "a"}),
    "caption the other way": Layout({f"{NFC}.png": "", f"{NFD}.txt": "a"}, {f"{NFC}.png": "a"}),
    "caption in a folder": Layout({f"{NFC}/a.png": "", f"{NFD}/a.txt": "a"}, {f"{NFC}/a.png": "a"}),
    "row": Layout({f"{NFD}.png": "", "metadata.csv": f"file_name,text\n{NFC}.png,a"}, {f"{NFD}.png": "a"}),
    "row the other way": Layout(
        {f"{NFC}.png": "", "metadata.csv": f"file_name,text\n{NFD}.png,a"}, {f"{NFC}.png": "a"}
    ),
    "row of another table": Layout(
        {f"{NFD}.png": "", "x.csv": f"file_name,text\n{NFC}.png,a"}, {f"{NFD}.png": "a"}
    ),
    "row without folder": Layout(
        {f"i/{NFD}.png": "", "x.csv": f"image,text\n{NFC}.png,a"}, {f"i/{NFD}.png": "a"}, (WITHOUT_FOLDER,)
    ),
    "Hangul": Layout(
        {unicodedata.normalize("NFD", "한.png"): "", "한.txt": "a"},
        {unicodedata.normalize("NFD", "한.png"): "a"},
    ),
    "narrow space": Layout({"1.00\u202fPM.png": "", "1.00 PM.txt": "a"}, {"1.00\u202fPM.png": "a"}),
    "mask beside": Layout(
        {f"{NFD}.png": "", f"{NFD}.txt": "a", f"{NFC}_mask.png": ""}, {f"{NFD}.png": "a"}, (MASK,)
    ),
    "both, each with its own": Layout(
        {f"{NFC}.png": "", f"{NFD}.png": "", f"{NFC}.txt": "c", f"{NFD}.txt": "d"},
        {f"{NFC}.png": "c", f"{NFD}.png": "d"},
        (TWINS,),
    ),
    "both, with one caption": Layout(
        {f"{NFC}.png": "", f"{NFD}.png": "", f"{NFC}.txt": "c"},
        {f"{NFC}.png": "c", f"{NFD}.png": "c"},
        (TWINS, SHARED),
    ),
    "both, each with its row": Layout(
        {f"{NFC}.png": "", f"{NFD}.png": "", "metadata.csv": f"file_name,text\n{NFC}.png,c\n{NFD}.png,d"},
        {f"{NFC}.png": "c", f"{NFD}.png": "d"},
        (TWINS,),
    ),
    "two captions that look the same": Layout(
        {f"{NFD}.png": "", f"{NFD}.txt": "d", f"{NFC}.txt": "c"}, {f"{NFD}.png": "d"}, (SECOND,)
    ),
    "other letters": Layout({"x².png": "", "x2.txt": "a"} | A, DOG, (NO_CAPTION, LONELY)),
}
LAYOUTS = (
    CAPTION_FILES
    | SIDECARS
    | TABLES
    | {f"{name} that looks the same": LOOKALIKES[name] for name in LOOKALIKES}
)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def remarks(found):
    return sorted(f"{finding.kind}: {finding.problem.partition(' (')[0]}" for finding in found.findings)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_another_program_is_understood(tmp_path, name):
    layout = LAYOUTS[name]
    write(tmp_path / "data", layout.files)
    found = find_examples(DataConfig(train_data_dir=tmp_path / "data" / layout.folder, **layout.settings))
    learned = {example.source: example.captions for example in found.examples}
    assert learned == {image: (caption,) for image, caption in layout.captions.items()}
    assert remarks(found) == sorted(layout.remarks)


def test_the_path_that_a_row_would_be_is_named(tmp_path):
    write(tmp_path, A | {"x/metadata.csv": "file_name,text\nb.png,a\n"})
    found = find_examples(DataConfig(train_data_dir=tmp_path))
    assert [finding.action for finding in found.findings] == ["put the image at x/b.png, or remove the row"]
    write(tmp_path / "data", {"images/a.png": "", "captions.csv": "image,text\npics/b.png,x"})
    for folder in ("data", "data/images"):
        with pytest.raises(DataError, match=r"captions\.csv .*its first row would be pics/b\.png"):
            find_examples(DataConfig(train_data_dir=tmp_path / folder))


NOT_USED = {
    # a table beside an image without caption: how it would be used
    "image,label_a\na.png,x\n": "set caption_column (label_a) to use it",
    "image,de,en\na.png,x,y\n": "set caption_column (de, en) to use it",
    "nr,text\na.png,x\n": "set image_column (nr, text) to use it",
    "a.png,a dog\nb.png,a cat\n": "write the line 'file_name,text' above its first to use it",
    "a.png;a dog\nb.png;a cat\n": "write the line 'file_name,text' above its first to use it",
}


@pytest.mark.parametrize("table", NOT_USED)
def test_a_table_that_is_not_used_says_how_it_would_be(tmp_path, table):
    write(tmp_path / "data", {"a.png": "", "b.png": "", "b.txt": "b", "mine.csv": table})
    found = find_examples(DataConfig(train_data_dir=tmp_path / "data"))
    [action] = [finding.action for finding in found.findings if finding.source == "mine.csv"]
    assert action == f"passed over; {NOT_USED[table]}"


@pytest.mark.parametrize("settings", [{"caption_column": "score"}, {"image_column": "name"}])
def test_who_names_a_column_means_the_table(tmp_path, settings):
    write(tmp_path / "data", A | {"metadata.csv": "id,score\n1,2\n"})
    with pytest.raises(DataError, match="no column"):
        find_examples(DataConfig(train_data_dir=tmp_path / "data", **settings))


MASKS = {
    "a_mask.png": "a.png",
    "a-mask.jpg": "a.png",
    "a.mask.png": "a.png",
    "a-masklabel.png": "a.png",
    f"{NFC}_mask.png": f"{NFD}.png",
    f"{NFC}.png": f"{NFD}.png",
}


@pytest.mark.parametrize(
    ("mask", "folder"),
    [(mask, folder) for mask in MASKS for folder in ("data", "masks") if "mask" in mask or folder == "masks"],
)
def test_masks_with_a_mark_are_found_among_images_and_apart(tmp_path, mask, folder):
    image = MASKS[mask]
    write(tmp_path / "data", {image: "image"})
    write(tmp_path / folder, {mask: mask})
    config = DataConfig(
        train_data_dir=tmp_path / "data", mask_data_dir=tmp_path / folder, instance_prompt="x"
    )
    found = find_examples(config)
    assert [(example.source, example.read_mask()) for example in found.examples] == [(image, mask.encode())]
    assert remarks(found) == ["noticed: no caption"]


def test_a_mask_of_the_very_name_comes_before_one_with_a_mark(tmp_path):
    write(tmp_path / "data", {"a.png": "", "a_mask.png": "", "a.txt": "a", "a_mask.txt": "b"})
    write(tmp_path / "masks", {"a.png": "plain", "a_mask.png": "marked"})
    found = find_examples(DataConfig(train_data_dir=tmp_path / "data", mask_data_dir=tmp_path / "masks"))
    assert {example.source: example.read_mask() for example in found.examples} == {
        "a.png": b"plain",
        "a_mask.png": b"marked",
    }


def test_a_condition_of_another_program_is_no_mask(tmp_path):
    files = {"a.png": "", "a-masklabel.png": "mask", "a-condlabel.png": "x", "_controls/a.png": "x"}
    write(tmp_path, files | {"b.png": "", "b-condlabel.png": "x"})
    found = find_examples(DataConfig(train_data_dir=tmp_path, mask_data_dir=tmp_path, instance_prompt="x"))
    masks = {example.source: example.read_mask and example.read_mask() for example in found.examples}
    assert masks == {"a.png": b"mask", "b.png": None}
    assert remarks(found) == ["noticed: no caption", "noticed: no mask"]
