"""Captions and metadata as they come: what is right, and what is wrong in each known way.

Every case is a folder with a picture, a.png, and what is said about it. No picture is real: none is opened.
"""

import io
import json
import os
from dataclasses import dataclass, field

import pyarrow
from pyarrow import parquet


@dataclass(frozen=True)
class Case:
    """Files, and what must become of a.png."""

    files: dict[str, bytes | str]
    """Contents by name; a content that starts with '-> ' is a link."""
    captions: tuple[str, ...] = ()
    """Of a.png; empty when it must be refused."""
    remarks: tuple[str, ...] = ()
    """'kind: problem' of every finding, without brackets."""
    error: str = ""
    """What the DataError must say, where there must be one."""
    settings: dict = field(default_factory=dict)


def write_case(case: Case, folder) -> None:
    for name, content in {"a.png": "", "sound.png": "", "sound.txt": "sound"}.items() | case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "pipe":
            os.mkfifo(path)
        elif isinstance(content, str) and content.startswith("-> "):
            path.symlink_to(content[3:])
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def text(content, *captions, remarks=(), **settings):
    return Case({"a.txt": content}, captions, remarks, settings=settings)


def rows(*lines, name="metadata.jsonl"):
    return {name: "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)}


def jsonl(*lines, captions=(), remarks=(), error="", files=None, **settings):
    return Case(rows(*lines) | (files or {}), captions, remarks, error, settings)


def csv(content, *captions, remarks=(), error="", **settings):
    return Case({"metadata.csv": content}, captions, remarks, error, settings)


def table(**columns):
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content)
    return {"metadata.parquet": content.getvalue()}


NO_ROW = "refused: no row in metadata.jsonl"
NO_ROW_CSV = "refused: no row in metadata.csv"
EMPTY = "refused: empty caption"
NOT_UTF8 = "refused: text that is not UTF-8"
USED = "noticed: caption file besides a row of metadata"
NO_METADATA = "refused: metadata without a usable row"
PROMPT = {"instance_prompt": "a photo"}
GOOD = {"file_name": "a.png", "text": "a dog"}
GOOD_SOUND = {"file_name": "sound.png", "text": "s"}

TEXTS = {
    "plain": text("a dog", "a dog"),
    "letters of the world": text("ein Hündchen 犬 🐕", "ein Hündchen 犬 🐕"),
    "letters and marks that are not composed": text("e\u0301", "e\u0301"),
    "byte-order mark": text(b"\xef\xbb\xbfa dog", "a dog"),
    "white space around and within": text("\r\n  a \t dog\u00a0 \r\n\n", "a dog"),
    "UTF-16": text("a dög".encode("utf-16"), "a dög", remarks=("fixed: UTF-16 text",)),
    "UTF-16, big endian": text(
        b"\xfe\xff" + "a dög".encode("utf-16-be"), "a dög", remarks=("fixed: UTF-16 text",)
    ),
    "UTF-16, cut short": text("a dog".encode("utf-16")[:-1], remarks=("refused: text that is not UTF-16",)),
    "UTF-16 without mark": text("a dog".encode("utf-16-le"), remarks=("refused: text with NUL bytes",)),
    "UTF-32": text("a dog".encode("utf-32"), remarks=("refused: text with NUL bytes",)),
    "Latin-1": text("ein Hündchen".encode("latin-1"), remarks=(NOT_UTF8,)),
    "Latin-1 with a prompt to fall back on": text("ü".encode("latin-1"), remarks=(NOT_UTF8,), **PROMPT),
    "NUL": text("a\0dog", remarks=("refused: text with NUL bytes",)),
    "binary": text(bytes(range(256)), remarks=(NOT_UTF8,)),
    "empty": text("", remarks=(EMPTY,)),
    "white space alone": text(" \n\t\n", remarks=(EMPTY,)),
    "zero-width space alone": text("\u200b", remarks=("fixed: invisible characters", EMPTY)),
    "empty with a prompt": text("", "a photo", remarks=("fixed: empty caption",), **PROMPT),
    "missing": Case({}, (), ("refused: no caption",)),
    "missing with a prompt": Case({}, ("a photo",), ("noticed: no caption",), settings=PROMPT),
    "zero-width and control characters": text(
        "a\u200b d\x07og", "a dog", remarks=("fixed: invisible characters",)
    ),
    "damaged before": text("a d\ufffdg", "a d\ufffdg", remarks=("noticed: damaged letters",)),
    "several lines": text("a dog\n\na hound\n", "a dog", "a hound", remarks=("noticed: several captions",)),
    "the same line twice": text("a dog\na dog", "a dog", remarks=("noticed: the same caption twice",)),
    "several lines that are one": text("a dog\nin  the snow\n", "a dog in the snow", caption_lines="one"),
    "white space alone that is one": text(" \n\t\n", remarks=(EMPTY,), caption_lines="one"),
    "UTF-16 lines that are one": text(
        "a dög\r\nasleep".encode("utf-16"),
        "a dög asleep",
        remarks=("fixed: UTF-16 text",),
        caption_lines="one",
    ),
    "absurdly long": text("dog " * 3000, remarks=("refused: caption of more than 10,000 characters",)),
    "huge": text("a dog\n" * 200_000, remarks=("refused: caption file of more than 1 MB",)),
    "ending in capitals": Case({"a.TXT": "a dog"}, ("a dog",)),
    "another ending": Case(
        {"a.caption": "a dog", "sound.caption": ""} | {"sound.txt": "not asked for"},
        ("a dog",),
        (EMPTY, "noticed: neither image nor caption"),
        settings={"caption_extension": ".caption"},
    ),
    "another ending that is not set": Case(
        {"a.caption": "a dog"}, ("a dog",), ("noticed: caption file that is no .txt",)
    ),
    "caption without image": Case(
        {"a.txt": "a dog", "b.txt": "a cat"}, ("a dog",), ("noticed: caption without image",)
    ),
    "pipe": Case({"a.txt": "pipe"}, (), ("refused: not a regular file",)),
    "link out of the folder": Case({"a.txt": f"-> {__file__}"}, (), ("refused: link out of the folder",)),
    "link to nowhere": Case({"a.txt": "-> nowhere.txt"}, (), ("refused: link that leads to no file",)),
    "link inside the folder": Case(
        {"a.txt": "-> sub/b.md", "sub/b.md": "a dog"}, ("a dog",), ("noticed: neither image nor caption",)
    ),
    "folder in its place": Case({"a.txt/b.png": "", "a.txt/b.txt": "x"}, (), ("refused: no caption",)),
}

ROWS = {
    "row": jsonl(GOOD, captions=("a dog",)),
    "row before text file": jsonl(
        GOOD,
        captions=("a dog",),
        files={"a.txt": "x"},
        remarks=("noticed: caption file besides a row of metadata",),
    ),
    "row in a folder below": Case(
        {"sub/a.png": "", **{f"sub/{name}": content for name, content in rows(GOOD).items()}},
        (),
        ("refused: no caption",),
    ),
    "row from the folder above": jsonl(
        {"file_name": "sub/b.png", "text": "a cat"}, GOOD, captions=("a dog",), files={"sub/b.png": ""}
    ),
    "column by another name": jsonl({"image": "./a.png", "Caption": "a dog"}, captions=("a dog",)),
    "columns that are set": jsonl(
        {"img": "a.png", "words": "a dog", "text": "x"},
        captions=("a dog",),
        image_column="img",
        caption_column="words",
    ),
    "columns unknown": jsonl({"file_name": "a.png", "etiquette": "a dog"}, error="etiquette: 'a dog'"),
    "column set that is not there": jsonl(
        GOOD, error="no column words; set caption_column", caption_column="words"
    ),
    "no column of names": jsonl({"nr": 1, "text": "a dog"}, error="no column file_name; set image_column"),
    "no column of captions but a prompt": jsonl(
        {"file_name": "a.png", "label": 3},
        captions=("a photo",),
        remarks=("noticed: metadata without a column of captions", "noticed: no row in metadata.jsonl"),
        **PROMPT,
    ),
    "row missing": jsonl({"file_name": "sound.png", "text": "s"}, remarks=(NO_ROW, USED)),
    "row missing but text file": jsonl(
        {"file_name": "sound.png", "text": "s"},
        captions=("a dog",),
        files={"a.txt": "a dog"},
        remarks=(USED,),
    ),
    "row missing with a prompt": jsonl(
        {"file_name": "sound.png", "text": "s"},
        captions=("a photo",),
        remarks=("noticed: no row in metadata.jsonl", USED),
        **PROMPT,
    ),
    "row without image": jsonl(
        GOOD,
        {"file_name": "b.png", "text": "x"},
        captions=("a dog",),
        remarks=("refused: row without image",),
    ),
    "row repeated": jsonl(GOOD, GOOD, captions=("a dog",), remarks=("noticed: repeated row",)),
    "rows that differ": jsonl(
        GOOD,
        GOOD | {"text": "a hound"},
        captions=("a dog", "a hound"),
        remarks=("noticed: another row about the same image", "noticed: several captions"),
    ),
    "list of captions": jsonl(
        GOOD | {"text": ["a dog", "a hound"]},
        captions=("a dog", "a hound"),
        remarks=("noticed: several captions",),
    ),
    "list with nothing in it": jsonl(
        GOOD | {"text": ["a dog", None]},
        captions=("a dog",),
        remarks=("noticed: nothing among several captions",),
    ),
    "list with nothing else": jsonl(GOOD | {"text": [None]}, GOOD_SOUND, remarks=(EMPTY, USED)),
    "list of a text and a number": jsonl(
        GOOD | {"text": ["a dog", 2]}, remarks=("refused: caption that is no text",)
    ),
    "list of numbers": jsonl(GOOD | {"text": [1, 2]}, remarks=("refused: caption that is no text",)),
    "null": jsonl(GOOD | {"text": None}, {"file_name": "sound.png", "text": "s"}, remarks=(EMPTY, USED)),
    "null with a prompt": jsonl(
        GOOD | {"text": None}, captions=("a photo",), remarks=("fixed: empty caption",), **PROMPT
    ),
    "number": jsonl(GOOD | {"text": 0}, remarks=("refused: caption that is no text",)),
    "zero-width characters in JSON": jsonl(
        GOOD | {"text": "a\u200b dog"}, captions=("a dog",), remarks=("fixed: invisible characters",)
    ),
    "half a surrogate pair": jsonl(
        '{"file_name": "a.png", "text": "a dog\\ud83d"}',
        captions=("a dog",),
        remarks=("fixed: invisible characters",),
    ),
    "line that is not JSON": jsonl(
        "{file_name: a.png}", GOOD, captions=("a dog",), remarks=("refused: not JSON",)
    ),
    "line cut short": jsonl(json.dumps(GOOD)[:-4], remarks=("refused: not JSON", NO_METADATA, NO_ROW)),
    "line that is a list": jsonl(
        ["a.png", "a dog"], GOOD, captions=("a dog",), remarks=("refused: not a JSON object",)
    ),
    "line nested without end": jsonl(
        "[" * 100_000, GOOD, captions=("a dog",), remarks=("refused: not JSON",)
    ),
    "key that stands there twice": jsonl(
        '{"file_name": "a.png", "text": "a dog", "text": "a cat"}',
        remarks=("refused: not JSON", NO_METADATA, NO_ROW),
    ),
    "file name that is a number": jsonl(
        GOOD | {"file_name": 7}, remarks=("refused: row without file name", NO_ROW)
    ),
    "absolute path": jsonl(GOOD | {"file_name": "/a.png"}, remarks=("refused: absolute path", NO_ROW)),
    "drive of Windows": jsonl(GOOD | {"file_name": "C:\\a.png"}, remarks=("refused: absolute path", NO_ROW)),
    "path out of the folder": jsonl(
        GOOD | {"file_name": "../a.png"}, remarks=("refused: path out of the folder", NO_ROW)
    ),
    "address": jsonl(
        GOOD | {"file_name": "https://x.org/a.png"}, remarks=("refused: address instead of a file", NO_ROW)
    ),
    "other host": jsonl(
        GOOD | {"file_name": "\\\\host\\a.png"}, remarks=("refused: address instead of a file", NO_ROW)
    ),
    "backslash": jsonl(
        GOOD | {"file_name": ".\\a.png"}, captions=("a dog",), remarks=("fixed: backslash in a file name",)
    ),
    "picture that is a link out": Case(
        rows({"file_name": "b.png", "text": "x"}, GOOD) | {"b.png": f"-> {__file__}"},
        ("a dog",),
        ("refused: link out of the folder",),
    ),
    "JSON in UTF-16": Case(
        {"metadata.jsonl": json.dumps(GOOD).encode("utf-16")}, ("a dog",), ("fixed: UTF-16 text",)
    ),
    "JSON in Latin-1": Case(
        {"metadata.jsonl": '{"file_name": "a.png", "text": "ü"}'.encode("latin-1")}, error="save it as UTF-8"
    ),
    "JSON without rows": Case(rows(), (), (NO_METADATA, NO_ROW)),
    "pipe of metadata": Case({"metadata.jsonl": "pipe"}, error="not a regular file"),
    "two metadata files": Case(
        rows(GOOD) | {"metadata.csv": "file_name,text\na.png,x"}, error="keep one of them"
    ),
    "CSV": csv("file_name,text\na.png,a dog\n", "a dog"),
    "CSV of Excel": csv("\ufefffile_name;text\r\na.png;a dog, brown\r\n", "a dog, brown"),
    "CSV with tabs": csv("file_name\ttext\na.png\ta dog, brown", "a dog, brown"),
    "CSV with quotes over two lines": csv('file_name,text\na.png,"a ""dog"",\nbrown"\n', 'a "dog", brown'),
    "CSV with a comma too many": csv(
        "file_name,text\na.png,a dog, brown\nsound.png,s",
        remarks=("refused: wrong number of fields", NO_ROW_CSV, USED),
    ),
    "CSV with a quote that never ends": csv(
        'file_name,text\nsound.png,s\na.png,"a dog\n', remarks=("refused: not CSV", NO_ROW_CSV, USED)
    ),
    "CSV without header": csv("a.png,a dog\nsound.png,s", error="no column file_name"),
    "CSV with a column twice": csv("file_name,text,text\na.png,a,b", error="same name"),
    "CSV in Latin-1": csv("file_name,text\na.png,é".encode("latin-1"), error="save it as UTF-8"),
    "CSV with an empty caption": csv("file_name,text\na.png,\nsound.png,s", remarks=(EMPTY, USED)),
    "parquet": Case(table(file_name=["a.png"], text=["a dog"]), ("a dog",)),
    "parquet with lists": Case(
        table(file_name=["a.png"], captions=[["a dog", "a hound"]]),
        ("a dog", "a hound"),
        ("noticed: several captions",),
    ),
    "parquet with null": Case(
        table(file_name=["a.png", "sound.png", None], text=[None, "s", "x"]),
        (),
        (EMPTY, USED, "refused: row without file name"),
    ),
    "parquet that is none": Case({"metadata.parquet": "PAR1 or so"}, error="cannot be read as parquet"),
}
CASES = TEXTS | ROWS
