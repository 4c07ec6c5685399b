"""The sheet: no column alone in its row, every prompt readable as far as this machine has letters for it."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from lora_utils.compare import labels, sheet
from lora_utils.compare.sampling import Shot

DEJAVU = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
TAGS = "masterpiece,best_quality,1girl,solo,red_hair,blue_eyes,long_hair,looking_at_viewer,outdoors"


@pytest.fixture
def forget_fonts():
    """Fonts are looked for once in a process; these tests change them."""
    caches = (labels._font_for, labels._opened, labels._system_paths)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def only_dejavu(monkeypatch, forget_fonts):
    monkeypatch.setattr(labels, "findSystemFonts", lambda: [])


def shots_of(prompts, seeds):
    return [Shot(f"prompt {prompt}", seed) for prompt in range(prompts) for seed in range(seeds)]


@pytest.mark.parametrize("prompts", range(1, 21))
def test_no_column_is_alone_in_its_row(prompts):
    for seeds in (*range(1, 11), 17):
        whole = shots_of(prompts, seeds)
        for count in {len(whole), len(whole) - 1, seeds + 1} & set(range(2, len(whole) + 1)):
            bands = sheet._bands(whole[:count])
            assert [column for band in bands for column in band] == list(range(count))
            assert 2 <= min(map(len, bands)) <= max(map(len, bands)) <= sheet.SHEET_COLUMNS
        if seeds <= sheet.SHEET_COLUMNS:
            assert all(len(band) % seeds == 0 for band in sheet._bands(whole))


@pytest.mark.parametrize(
    "size", [(64, 64), (128, 72), (72, 128), (1280, 720), (512, 2048), (2048, 64)], ids=str
)
@pytest.mark.parametrize(("prompts", "seeds"), [(1, 1), (2, 1), (3, 3), (7, 1), (9, 1), (1, 9)])
def test_every_tile_is_whole_on_the_sheet(prompts, seeds, size):
    shots = shots_of(prompts, seeds)
    red = Image.new("RGB", size, "red")
    drawn = sheet.contact_sheet(shots, {"base": [red] * len(shots), "LoRA × -0.333333": [red] * len(shots)})
    width = max(sheet.TILE_PX, size[0] // 4)
    height = round(width * size[1] / size[0])
    area = (np.asarray(drawn) == (255, 0, 0)).all(axis=-1).sum()
    assert area == 2 * len(shots) * (width - sheet.GAP_PX) * (height - sheet.GAP_PX)


TEXTS = [
    ("a red star", "a red star"),
    ("  spaces \n and\tlines ", "spaces and lines"),
    ("été à la mer, señorita, naïve", "été à la mer, señorita, naïve"),
    ("e\u0301te\u0301", "été"),  # accents as characters of their own
    ("Привет, γειά σου", "Привет, γειά σου"),
    ("مرحبا بالعالم", "مرحبا بالعالم"),
    ("שלום 😀 ❤\ufe0f", "שלום 😀 ❤"),
    ("½ × 5 % → ∞", "½ × 5 % → ∞"),
    ("!!!", "!!!"),
    ("\u202etxet", "txet"),  # would turn the whole label round
    ("a\u200bb\ufeff", "ab"),
    ("一只猫", ""),
    ("一只猫, 4k", "…, 4k"),
    ("cat 猫 and 犬 dog", "cat … and … dog"),
    ("ねこ・イヌ, 한국어", ""),
    ("नमस्ते", ""),
    ("\ue000\U000f0000 private", "… private"),
    ("\ud7ff\u0378", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "label"), TEXTS, ids=[ascii(text) for text, _ in TEXTS])
def test_what_fonts_lack_is_left_out_and_never_a_box(only_dejavu, text, label):
    assert labels.drawable(text) == label
    assert set(map(ord, label)) <= TTFont(DEJAVU).getBestCmap().keys()


def make_font(path, text):
    """A font whose letters are full squares, for every character of a text."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    glyphs = [".notdef", *(f"u{ord(character):X}" for character in text)]
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(character): f"u{ord(character):X}" for character in text})
    builder.setupGlyf(dict.fromkeys(glyphs, square))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800)
    builder.setupPost()
    builder.save(path)
    return str(path)


def test_a_font_of_this_machine_is_used_where_it_has_the_letters(monkeypatch, forget_fonts, tmp_path):
    damaged = tmp_path / "Damaged.ttf"
    damaged.write_bytes(b"no font")
    fonts = [
        str(damaged),
        make_font(tmp_path / "CJKSansBold.ttf", "猫犬"),
        make_font(tmp_path / "CJKSans.ttf", "猫"),
    ]
    monkeypatch.setattr(labels, "findSystemFonts", lambda: fonts)
    assert labels.drawable("猫 cat 犬 鳥") == "猫 cat 犬 …"
    assert [(text, font.getname()[0]) for text, font in labels._runs("猫 cat 犬")] == [
        ("猫", "CJKSans"), (" cat ", "DejaVu Sans"), ("犬", "CJKSansBold"),
    ]  # fmt: skip
    canvas = Image.new("RGB", (100, 20), "white")
    labels.write_line(ImageDraw.Draw(canvas), 0, 0, "猫", "black")
    assert (np.asarray(canvas) == 0).all(axis=-1).sum() >= 8 * 8  # the square, of 0.8 of 13 px


@pytest.mark.parametrize("name", ["LastResort", "LastResortHE-Regular", "AdobeBlank", "UnicodeTofu"])
def test_a_font_of_boxes_is_none(monkeypatch, forget_fonts, tmp_path, name):
    monkeypatch.setattr(labels, "findSystemFonts", lambda: [make_font(tmp_path / f"{name}.ttf", "猫")])
    assert labels.drawable("猫 cat") == "… cat"


def test_without_bidirectional_layout_such_scripts_are_left_out(monkeypatch, only_dejavu):
    monkeypatch.setattr(labels, "_lays_out_any_script", lambda: False)
    assert labels.drawable("star نجمة שלום") == "star … …"
    assert labels.drawable("été") == "été"


@pytest.mark.parametrize("text", ["a red star", "été, Привет", "مرحبا بالعالم", "שלום עולם star"])
def test_a_line_of_one_font_is_what_pillow_draws(only_dejavu, text):
    ours = Image.new("RGB", (300, 24), "white")
    labels.write_line(ImageDraw.Draw(ours), 3, 2, text, "black")
    theirs = Image.new("RGB", (300, 24), "white")
    font = ImageFont.truetype(DEJAVU, labels.FONT_PX)
    ImageDraw.Draw(theirs).text((3, 2 + labels.FONT_PX), text, "black", font, anchor="ls")
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, Image.new("RGB", (300, 24), "white"))


@pytest.mark.parametrize(
    "text",
    [
        TAGS,
        "w" * 90,
        "a lighthouse by the sea at dusk, waves " * 2,
        "/data/some/path/to/some/file.png" * 2,
        "x",
    ],
)
@pytest.mark.parametrize("width_px", [80, 244, 500])
def test_lines_fit_and_hold_all_of_the_text(text, width_px):
    font = ImageFont.truetype(DEJAVU, labels.FONT_PX)
    lines = labels.wrapped(text, width_px, most_lines=99)
    assert all(font.getlength(line) <= width_px for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = labels.wrapped(text, width_px, most_lines=2)
    assert len(short) <= 2
    assert all(font.getlength(line) <= width_px for line in short)
    if len(lines) > 2:
        assert short[0] == lines[0]
        assert short[1].endswith("…")
        assert lines[1].startswith(short[1][:-1])


def test_tags_are_broken_between_tags():
    assert labels.wrapped(TAGS, 244, 9)[0] == "masterpiece,best_quality,1girl,solo,"
    assert all(line.endswith(",") for line in labels.wrapped(TAGS, 244, 9)[:-1])


def test_labels_name_the_files_numbers(only_dejavu):
    shots = [Shot("一只猫", 42), Shot("a fox", 42), Shot("a fox", 2**63 - 1)]
    texts = [[text for text, _ in lines] for lines in sheet._labels(shots, 160)]
    assert texts == [
        ["prompt 1, seed 42"],
        ["a fox", "prompt 2, seed 42"],
        ["a fox", "prompt 2, seed", "9223372036854775807"],
    ]
