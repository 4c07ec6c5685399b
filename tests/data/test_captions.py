"""Captions and metadata: read right, fixed with a remark, or refused by name; and their variants."""

from math import factorial

import pytest

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import caption_form, caption_variants
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError
from tests.data.caption_corpus import CASES, write_case


def find(case, folder):
    """The captions of a.png, and the remarks in the words of the corpus."""
    write_case(case, folder)
    found = find_examples(DataConfig(train_data_dir=folder, **case.settings))
    captions = [example.captions for example in found.examples if example.source == "a.png"]
    return captions, sorted(
        f"{finding.kind}: {finding.problem.partition(' (')[0]}" for finding in found.findings
    )


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_the_corpus_ends_as_it_must(name, tmp_path):
    case = CASES[name]
    if case.error:
        with pytest.raises(DataError, match=case.error):
            find(case, tmp_path)
    else:
        assert find(case, tmp_path) == ([case.captions] if case.captions else [], sorted(case.remarks))


def test_no_case_of_the_corpus_is_silent(tmp_path):
    assert len(CASES) >= 34
    silent = []
    for number, (name, case) in enumerate(CASES.items()):
        (tmp_path / str(number)).mkdir()
        try:
            captions, remarks = find(case, tmp_path / str(number))
        except DataError:
            continue
        if captions != [case.captions] and not any(remark.startswith("refused") for remark in remarks):
            silent.append(name)
    assert silent == []


FORMS = {
    "": [
        "a dog",
        "a dog\na hound",
        "a dog\n\na hound\n",
        "a red dog, asleep\na hound, asleep",
        "[trigger]",
        "{red|blue}",
        "A dog.\nA hound.",
        "a\nb\nc\nd",
    ],
    "JSON": [
        '{\n "subject": "dog",\n "colour": "red"\n}',
        '["dog",\n"red"]',
        '{"caption": "a dog"}',
        "```\n{}\n```",
    ],
    "wrapped tags": ["1girl, solo,\nred hair,\n", "dog, red ,  \r\nsnow", "1girl, solo,\n\nred hair"],
    "paragraphs": [
        "A dog.\n\nIt sleeps.",
        "A dog!\r\n\r\nIt sleeps",
        "一只狗。\n \n睡觉",
        "dog " * 30 + "\n\n" + "cat " * 30,
    ],
    "a list with headings": [
        "- dog\n- snow",
        "1. dog\n2. snow",
        "Subject: a dog\nColour: red",
        "# Dog\nred",
        "**Dog**\nred",
    ],
    "generation settings": [
        "a dog\nNegative prompt: blurry\nSteps: 20, Sampler: Euler",
        "a dog\nSteps: 20, Seed: 1",
    ],
    "a tag on each": ["1girl\nsolo\nred hair\nsmile\nsky"],
}


@pytest.mark.parametrize(("form", "text"), [(form, text) for form in FORMS for text in FORMS[form]])
def test_lines_that_are_one_caption_are_recognised_and_told(form, text, tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_bytes(text.encode())
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]

    assert caption_form(text) == form
    found = find_examples(DataConfig(train_data_dir=tmp_path))
    assert found.examples[0].captions == tuple(dict.fromkeys(lines))
    told = [finding for finding in found.findings if "look like one caption" in finding.problem]
    assert [f"({form})" in finding.problem for finding in told] == [True] * (form != "" and len(lines) > 1)
    assert all("caption_lines=one" in finding.action for finding in told)

    found = find_examples(DataConfig(train_data_dir=tmp_path, caption_lines="one"))
    assert found.examples[0].captions == (" ".join(lines),)
    warned = [finding.problem for finding in found.findings if "looks like" in finding.problem]
    assert warned == [f"caption that looks like {form}"] * (form in ("JSON", "generation settings"))


def variants(caption, **settings):
    return caption_variants(caption, DataConfig(**settings))


def test_the_trigger_word_is_put_where_it_lacks():
    assert variants("a dog") == ["a dog"]
    assert variants("a dog", trigger_word="sks") == ["sks, a dog"]
    assert variants("a SKS dog", trigger_word="sks") == ["a SKS dog"]
    assert variants("asks a dog", trigger_word="sks") == ["sks, asks a dog"]
    assert variants("a [trigger] dog, [trigger]", trigger_word="sks") == ["a sks dog, sks"]
    assert variants("a c++ book", trigger_word="c++") == ["a c++ book"]
    assert variants("a dog", trigger_word=" ") == ["a dog"]


def test_shuffled_tags_keep_the_first_ones_and_begin_with_the_order_as_written():
    orders = variants("1girl, solo,red, blue ,green", shuffle_caption=True, keep_tokens=2, caption_variants=6)
    assert orders[0] == "1girl, solo, red, blue, green"
    assert len(set(orders)) == 6
    assert all(order.startswith("1girl, solo, ") for order in orders)
    assert {tuple(sorted(order.split(", "))) for order in orders} == {
        ("1girl", "blue", "green", "red", "solo")
    }


def test_the_trigger_word_counts_as_the_first_tag_and_stays_in_front():
    settings = {"trigger_word": "sks", "shuffle_caption": True, "caption_variants": 24}
    assert all(order.startswith("sks, ") for order in variants("a, b, c, d", **settings))
    assert all(order.startswith("sks, a, ") for order in variants("a, b, c, d", **settings, keep_tokens=2))
    assert all(order.startswith("photo of sks, ") for order in variants("a, b, photo of sks", **settings))
    assert len(variants("a, b, c, d", **settings)) == 24


@pytest.mark.parametrize(
    ("caption", "possible"),
    [("a", 1), ("a, b", 2), ("a, b, c", 6), ("a, a, b", 3), ("a, b, c, d, e", factorial(5)), (",", 1)],
)
def test_there_are_as_many_orders_as_possible_and_no_order_twice(caption, possible):
    orders = variants(caption, shuffle_caption=True, caption_variants=1000)
    assert len(orders) == len(set(orders)) == possible


def test_orders_depend_on_the_caption_alone():
    """Literally: another platform, version or seed must not ask for a new encoding."""
    orders = variants("a, b, c, d, e", shuffle_caption=True, caption_variants=3)
    assert orders == variants("a, b, c, d, e", shuffle_caption=True, caption_variants=5)[:3]
    assert orders == ["a, b, c, d, e", "b, a, d, e, c", "c, e, a, b, d"]
