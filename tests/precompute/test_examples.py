"""The list of examples: parsed one by one, refused when it is damaged."""

import pytest

from lora_utils.precompute.examples import Entry, IndexFileError, encode_index, read_index, write_index


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
    write_index(tmp_path, encode_index(entries))
    index = read_index(tmp_path)
    assert list(index) == entries
    assert index[-1] == entries[-1]
    with pytest.raises(IndexError):
        index[5]


def test_a_damaged_index_is_an_error(tmp_path):
    with pytest.raises(IndexFileError, match="run the precompute stage"):
        read_index(tmp_path)
    write_index(tmp_path, encode_index([entry(1), entry(2)]))
    path = tmp_path / "index.jsonl"
    for content in (b"", b"{", path.read_bytes()[:-60], b"[]\n" + path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(IndexFileError, match="damaged"):
            read_index(tmp_path)
