"""The list of examples: read back as it was, refused when it is damaged."""

import pytest

from lora_utils.precompute.examples import Entry, IndexFileError, read_index, write_index


def entry(number, **changes):
    fields = {
        "source": f"{number}.png",
        "captions": (f"caption {number} é",),
        "image_keys": (f"{number:032x}",),
        "text_keys": (f"{number + 99:032x}",),
        "size": (64, 48),
        "repeats": 1,
        "held_out": False,
    }
    return Entry(**fields | changes)


def test_the_index_reads_back(tmp_path):
    entries = [entry(number) for number in range(5)]
    write_index(tmp_path, entries)
    assert read_index(tmp_path) == tuple(entries)


def test_the_index_is_a_counting_line_and_one_line_an_example(tmp_path):
    write_index(tmp_path, [entry(1)])
    head = '{"schema": 2, "examples": 1}'
    row = (
        f'{{"source": "1.png", "captions": ["caption 1 \\u00e9"], "image_keys": ["{1:032x}"], '
        f'"text_keys": ["{100:032x}"], "size": [64, 48], "repeats": 1, "held_out": false}}'
    )
    assert (tmp_path / "index.jsonl").read_text() == f"{head}\n{row}\n"


def test_an_index_that_says_so_already_is_left_alone(tmp_path):
    write_index(tmp_path, [entry(1)])
    before = (tmp_path / "index.jsonl").stat().st_mtime_ns
    write_index(tmp_path, [entry(1)])
    assert (tmp_path / "index.jsonl").stat().st_mtime_ns == before


def test_a_damaged_index_is_an_error(tmp_path):
    with pytest.raises(IndexFileError, match="run the precompute stage"):
        read_index(tmp_path)
    write_index(tmp_path, [entry(1), entry(2)])
    path = tmp_path / "index.jsonl"
    head, _, second = path.read_bytes().splitlines(keepends=True)
    for content in (
        b"",
        b"{",
        path.read_bytes()[:-60],
        b"[]\n" + path.read_bytes(),
        *(head + line + b"\n" + second for line in (b"[]", b"{}", b"[" * 9999)),
        path.read_bytes().replace(b"size", b"side"),
    ):
        path.write_bytes(content)
        with pytest.raises(IndexFileError, match="damaged"):
            read_index(tmp_path)
