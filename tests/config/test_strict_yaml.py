"""A file means what it looks like, or is refused in one line."""

import random
import time
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.faults.yaml_inputs import BOMBS, LONGEST_LINE, NASTY, inputs, outcome
from lora_utils.config.loading import ConfigError, all_settings, dump_config, load_config
from lora_utils.config.strict_yaml import MAX_FILE_BYTES, YamlError, one_line, read_yaml, write_yaml


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            ("1e-4", 1e-4),
            ("1E5", 1e5),
            (".5e3", 500.0),
            ("-1.5E-3", -1.5e-3),
            ("1e5", 1e5),
            ("+.5", 0.5),
            ("1.", 1.0),
        ],
        *[
            ("010", 10),
            ("-012", -12),
            ("09", 9),
            ("0o17", 15),
            ("0x1F", 31),
            ("12:30", "12:30"),
            ("1_000", "1_000"),
        ],
        *[
            ("no", "no"),
            ("yes", "yes"),
            ("on", "on"),
            ("Off", "Off"),
            ("y", "y"),
            ("true", True),
            ("FALSE", False),
        ],
        *[("~", None), ("null", None), ("", None), ("none", "none"), ("fp32", "fp32"), ("auto", "auto")],
        *[
            ("2024-01-01", "2024-01-01"),
            ("-.inf", float("-inf")),
            ("0b1", "0b1"),
            ("=", "="),
            ("1.2.3", "1.2.3"),
        ],
        *[
            ("'010'", "010"),
            ('"1e-4"', "1e-4"),
            ('"#fff"', "#fff"),
            ("a#b", "a#b"),
            ("# note", None),
            ("9" * 400, 9e999),
        ],
        *[
            ("[1e-4, no, 12:30]", [1e-4, "no", "12:30"]),
            ("|\n  two\n  lines\n", "two\nlines\n"),
            ("😀 é", "😀 é"),
        ],
        *[("&a [1, 2]\nseeds: *a", [1, 2]), ("{a: {b: 1}}", {"a": {"b": 1}})],
    ],
)
def test_a_value_is_what_it_looks_like(file, text, value):
    file.write_text(f"name: {text}\n", encoding="utf-8")
    found = read_yaml(file)["name"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"rank: 8\nseed: 1\nrank: 4\n", ["line 3", "'rank' is there twice"]),
        (b"lora:\n  rank: 8\n  'rank': 8\n", ["line 3", "'rank' is there twice"]),
        (b"seed: {a: 1, a: 1}\n", ["line 1", "'a' is there twice"]),
        (b"1: 2\n", ["1 is not the name"]),
        (b"true: 2\n", ["True is not the name"]),
        (b"lora:\n  ~: 2\n", ["line 2", "None is not the name"]),
        (b"? [a]\n: 2\n", ["cannot be a list"]),
        (b"<<: {rank: 8}\n", ["merge keys"]),
        (b"rank: !!python/object/apply:os.system ['true']\n", ["line 1", "tag", "os.system"]),
        (b"rank: !!int 8\n", ["tag !!int", "without it"]),
        (b"rank: !mine 8\n", ["tag !mine"]),
        (b"lora: !!map\n  rank: 8\n", ["tag"]),
        (b"rank: *a\n", ["*a stands for nothing"]),
        (b"prompt: &a [*a]\n", ["*a stands for nothing"]),
        (b"rank: 1\n---\nrank: 2\n", ["line 2", "second document"]),
        (b"alpha_background: #fff\n", ["line 1", "#fff is read as a comment"]),
        (b"prompt:\n  - #fff\n", ["line 2", "#fff is read as a comment"]),
        (b"prompt: a: b\n", ["line 1", "quotes"]),
        (b"lora:\n\trank: 8\n", ["line 2", "spaces"]),
        (b"a: [\n", ["line 2", "expected"]),
        (b"rank: !" + b"x" * 900 + b" 8\n", ["line 1", "tag !xxx", "without it"]),
        (b"k" * 120 + b": 1\n" + b"k" * 120 + b": 1\n", ["line 2", "kkk…", "keep one"]),
        (b"- 1\n", ["rank: 16", "list"]),
        (b"text\n", ["rank: 16", "str"]),
        (b"rank: 8\nprompt: caf\xe9\n", ["line 2", "0xe9", "UTF-8"]),
        ("rank: 8\n".encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
        ("rank: 8\n".encode("utf-16-le"), ["UTF-16"]),
        ("rank: 8\n".encode("utf-32"), ["UTF-16"]),
        (b"rank: 8\0\n", ["no text"]),
        (b"rank: 8\nprompt: \x07\n", ["line 2", "U+0007"]),
        (b'prompt: "\\0"\n', ["line 1", "escaped"]),
        (b'prompt: "\\ud800"\n', ["line 1", "escaped"]),
        (b'prompt: "\\UFFFFFFFF"\n', ["escaped"]),
        (b"[" * 1000, ["levels"]),
        (b"a: " * 1000, ["line 1"]),
        (b"seeds: [" + b"1," * 20_000 + b"]", ["more than 10000 values"]),
        (b"#" * (MAX_FILE_BYTES + 1), ["128 KiB"]),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else "",
)
def test_what_misleads_is_refused_in_one_line(file, content, words):
    file.write_bytes(content)
    with pytest.raises(YamlError) as error:
        read_yaml(file)
    message = str(error.value)
    assert message.startswith(str(file))
    assert all(word in message for word in words), message
    assert message.isprintable()
    assert len(message) <= LONGEST_LINE


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"---\n", b"~\n", b"\xef\xbb\xbf# BOM alone"])
def test_a_file_of_nothing_is_no_settings(file, content):
    file.write_bytes(content)
    assert read_yaml(file) == {}


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_settings(file):
    file.write_bytes(b"\xef\xbb\xbfrank: 8\r\nseed: 1\r\n")
    assert read_yaml(file) == {"rank": 8, "seed": 1}


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("on", True), ("no", False), ("off", False), ("FALSE", False)]
)
def test_switches_take_the_words_of_yaml_1_1(file, word, value):
    file.write_text(f"random_flip: {word}\n")
    assert load_config(file).data.random_flip is value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mixed_precision: no", ["mixed_precision", "full precision is fp32"]),
        ("trigger_word: 1e5", ["trigger_word", "100000.0", "put it in quotes"]),
        ("revision: 1234567", ["revision", "put it in quotes"]),
        ("gradient_checkpointing: [full]", ["gradient_checkpointing", "one value"]),
        ("rank: {a: 1}", ["rank", "one value"]),
        ("rank: 12:30", ["rank", "12:30"]),
        ("'a\\nb\\x07': 1", ["no setting"]),
        ('"a\\nb\\x07": 1', ["no setting", "a\\nb\\x07"]),
        ("? " + "a" * 5000 + "\n: 1", ["no setting", "…"]),
        ("seeds: [" + "x, " * 2000 + "]", ["seeds", "and 1997 more"]),
    ],
)
def test_the_schemas_complaints_are_one_line_too(file, text, words):
    file.write_text(text + "\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert all(word in str(error.value) for word in words), error.value
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= LONGEST_LINE


def test_no_setting_takes_a_number_that_is_not_finite():
    for leaf in all_settings():
        for number in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(ConfigError, match=leaf):
                load_config(None, {leaf: number})
        if float in (annotation := all_settings()[leaf][1].annotation, *get_args(annotation)):
            with pytest.raises(ConfigError, match=f"{leaf}.*finite"):
                load_config(None, {leaf: "nan"})


def test_an_alias_bomb_is_refused_at_once(file):
    file.write_text(BOMBS[0])
    started = time.monotonic()
    with pytest.raises(YamlError, match="10000 values"):
        read_yaml(file)
    assert time.monotonic() - started < 1


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(YamlError, match="absent"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="no config file"):
        load_config(Path("\0"))


def test_every_text_comes_back_from_the_file_it_was_written_to(file):
    generator = random.Random(0)
    texts = [
        *NASTY,
        *(
            "".join(generator.choices("019.eExo_:-+#'\"!&*[]{},|>%@ nyNYtf\n\t\r\x85\u2028é", k=5))
            for _ in range(500)
        ),
    ]
    texts = [text for text in texts if "hf_" not in text]
    file.write_text(write_yaml({"texts": texts}), encoding="utf-8", newline="")
    assert read_yaml(file) == {"texts": texts}
    config = load_config(None, {"prompt": texts, "negative_prompt": "1e5", "revision": "09"})
    file.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(file) == config


def test_a_line_loses_its_middle_and_its_control_characters():
    assert one_line("a\nb\x1b[0m") == "a\\nb\\x1b[0m"
    assert one_line("begin" + "x" * 900 + "end").startswith("begin")
    assert one_line("begin" + "x" * 900 + "end").endswith("end")
    assert len(one_line("x" * 900)) <= 300


def test_two_thousand_strange_files_are_valid_or_refused_in_one_line(file):
    outcomes = [outcome(content, file) for content in inputs(seed=0, count=2000)]
    assert 100 < outcomes.count("valid") < 1900
