"""Much besides pixels, and formats that an extra brings: read right, or refused with what would read them."""

import io
import json
import random
import runpy
import struct
import sys
import tomllib
import zlib

import numpy as np
import pytest
from PIL import Image

from lora_utils.config.data import DataConfig
from lora_utils.data import formats, images
from lora_utils.data.dataset import find_examples
from tests.conftest import ROOT
from tests.data import image_corpus as make
from tests.data.image_corpus import PICTURE, Case, chunk, jpeg, png, save
from tests.data.test_images import is_as_expected, outcome

MIB = 2**20
DIGITS = random.Random(0).randbytes(MIB).hex().encode()
"""2 MiB of text that is packed to a half."""
NODES = [{"id": number, "type": f"Node{number % 97}", "pos": [number * 7, 99]} for number in range(60_000)]
WORKFLOW = json.dumps(NODES).encode()


def large_profile(size):
    """The profile that exchanges red and blue, with as many bytes behind its tables."""
    body = make.BGR + random.Random(1).randbytes(size)
    return struct.pack(">I", len(body)) + body[4:]


def ztxt(content):
    return chunk(b"zTXt", b"workflow\0\0" + zlib.compress(content, 1))


def itxt(content, packed):
    text = zlib.compress(content, 1) if packed else content
    return chunk(b"iTXt", b"prompt\0" + bytes((packed, 0)) + b"\0\0" + text)


def iccp(profile):
    return chunk(b"iCCP", b"a\0\0" + zlib.compress(profile, 1))


def comments(content):
    """Segments of a JPEG, 65,533 bytes at most in each."""
    pieces = (content[start : start + 65_533] for start in range(0, len(content), 65_533))
    return b"".join(b"\xff\xfe" + struct.pack(">H", len(piece) + 2) + piece for piece in pieces)


def much_besides_pixels():
    bgr = np.ascontiguousarray(PICTURE[..., ::-1])
    turned = chunk(b"eXIf", make.exif(6)[6:])
    photo = jpeg(PICTURE)
    assert len(WORKFLOW) > 3 * MIB
    right = {
        "packed workflow.png": png(PICTURE, before=ztxt(WORKFLOW)),
        "workflow of 30 MiB.png": png(PICTURE, before=ztxt(WORKFLOW * 10)),
        "packed international text.png": png(PICTURE, before=itxt(WORKFLOW, True)),
        "plain international text.png": png(PICTURE, before=itxt(WORKFLOW, False)),
        "plain text of 66 MiB.png": png(PICTURE, before=chunk(b"tEXt", b"a\0" + bytes([120]) * 66 * MIB)),
        "many texts of 2 MiB.png": png(PICTURE, before=ztxt(DIGITS) * 33),
        "letters of one kind.png": png(PICTURE, before=ztxt(b"x" * 5 * MIB)),
        "behind the pixels.png": png(PICTURE, after=ztxt(WORKFLOW) + itxt(WORKFLOW, True)),
        "unknown chunk.png": png(PICTURE, before=chunk(b"caBX", DIGITS * 2)),
        "much exif.png": png(PICTURE, before=chunk(b"eXIf", make.exif(1)[6:] + DIGITS * 2)),
        "xmp.webp": save(PICTURE, "WEBP", lossless=True, xmp=DIGITS * 2),
        "description.tif": save(PICTURE, "TIFF", tiffinfo={270: (DIGITS * 2).decode()}),
    }
    cases = {name: Case(content, "right", PICTURE) for name, content in right.items()}
    cases["comments.jpg"] = Case(photo[:2] + comments(DIGITS * 2) + photo[2:], "right", PICTURE, 4)
    turns = {
        "exif behind, then text.png": turned + ztxt(WORKFLOW),
        "exif behind text.png": ztxt(DIGITS) + turned,
    }
    for name, after in turns.items():
        cases[name] = Case(png(make.stored(PICTURE, 6), after=after), "fixed: turned", PICTURE)
    for size in (2 * MIB, 7 * MIB):
        profile = large_profile(size)
        cases[f"profile {size}.png"] = Case(png(bgr, before=iccp(profile)), "fixed: sRGB", PICTURE, 1)
        cases[f"profile {size}.jpg"] = Case(jpeg(bgr, icc_profile=profile), "fixed: sRGB", PICTURE, 5)
    return cases


def bombs():
    zeros = bytes(17 * MIB)
    table = {
        "text.png": png(PICTURE, before=ztxt(zeros)),
        "international text.png": png(PICTURE, before=itxt(zeros, True)),
        "profile.png": png(PICTURE, before=iccp(zeros)),
        "text behind.png": png(PICTURE, after=ztxt(zeros)),
        "many texts.png": png(PICTURE, before=ztxt(bytes(3 * MIB)) * 6),
        "text of 300 MiB.png": png(PICTURE, before=ztxt(zeros * 18) + chunk(b"caBX", DIGITS)),
    }
    return {f"bomb: {name}": Case(content, "refused: damaged") for name, content in table.items()}


METADATA = much_besides_pixels() | bombs()


@pytest.mark.parametrize("name", METADATA)
def test_text_and_profiles_of_megabytes_are_no_damage_and_bombs_are(name):
    assert is_as_expected(METADATA[name]), outcome(METADATA[name])


def encoded(pixels, file_format, **options):
    """Without loss, as far as the format can."""
    lossless = {"quality": -1, "chroma": 444} if file_format == "HEIF" else {"lossless": True}
    return save(pixels, file_format, **lossless | options)


def of_a_plugin(file_format, path):
    """What holds for other formats, in one that a plugin reads; HEIF turns colours, and is off by one."""
    off = 1 if file_format == "HEIF" else 0
    clear = make.with_alpha(PICTURE, np.where(make.HIDDEN, 0, 255))
    cases = {
        "rgb": Case(encoded(PICTURE, file_format), "right", PICTURE, off),
        "grey": Case(encoded(make.GREY, file_format), "right", make.rgb(make.GREY), off),
        "lossy": Case(save(PICTURE, file_format, quality=95), "right", PICTURE, 24),
        "alpha": Case(encoded(clear, file_format), "fixed: laid over white", make.SHOWN, off),
        "opaque": Case(encoded(make.with_alpha(PICTURE, 255), file_format), "right", PICTURE, off),
        "cut": Case(encoded(PICTURE, file_format)[:-9], "refused: "),
        "half": Case(encoded(PICTURE, file_format)[:50], "refused: "),
        "large": Case(
            encoded(np.zeros((9000, 8000), np.uint8), file_format), "refused: more than 64 million"
        ),
    }
    for turn in range(2, 9):
        content = encoded(make.stored(PICTURE, turn), file_format, exif=make.exif(turn))
        # HEIF's own reader turns it, and has nothing to tell.
        expectation = "right" if file_format == "HEIF" else "fixed: turned as its EXIF says"
        cases[f"turned {turn}"] = Case(content, expectation, PICTURE, off)
    bgr = np.ascontiguousarray(PICTURE[..., ::-1])
    if file_format == "HEIF":
        cases["16 bit"] = Case(encoded(make.RAMP, "HEIF"), "fixed: scaled", make.rgb(make.SCALED), off)
        cases["profile"] = Case(encoded(bgr, "HEIF", icc_profile=make.BGR), "fixed: sRGB", PICTURE, 2)
        return cases

    # The encoder of JPEG XL takes 16 bits for linear light, and says so in a profile.
    linear = make.RAMP / 65535
    seen = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    cases["16 bit"] = Case(encoded(make.RAMP, "JXL"), "fixed: sRGB", make.rgb(np.rint(255 * seen)), 6)
    # It keeps other profiles only with the whole JPEG, which must be a file.
    path.write_bytes(jpeg(make.stored(bgr, 6), icc_profile=make.BGR, exif=make.exif(6)))
    with Image.open(path) as photo:
        packed = io.BytesIO()
        photo.save(packed, "JXL", lossless_jpeg=True)
    cases["a packed JPEG"] = Case(packed.getvalue(), "fixed: turned as its EXIF says", PICTURE, 5)
    cases["a packed JPEG's profile"] = Case(packed.getvalue(), "fixed: sRGB", PICTURE, 5)
    return cases


@pytest.mark.parametrize(("file_format", "package"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_formats_of_the_extra_keep_every_rule(file_format, package, tmp_path):
    pytest.importorskip(package)
    assert file_format in formats.FORMATS
    cases = of_a_plugin(file_format, tmp_path / "photo.jpg")
    assert len(cases) > 16
    wrong = {name: outcome(case) for name, case in cases.items() if not is_as_expected(case)}
    assert wrong == {}


SIDES = [(1, 1), (8, 8), (256, 256), (300, 200), (257, 513), (1920, 1080), (2000, 1000), (8191, 3), (4, 8200)]


@pytest.mark.parametrize(("width", "height"), SIDES)
def test_sides_are_read_from_the_header_of_jpeg_xl(width, height):
    pytest.importorskip("pillow_jxl")
    plain = save(np.zeros((height, width), np.uint8), "JXL", lossless=True, effort=1)
    boxed = save(np.zeros((height, width), np.uint8), "JXL", lossless=True, effort=1, use_container=True)
    for content in (plain, boxed, in_parts(plain, 1), in_parts(plain, 5)):
        assert formats.jxl_header(content) == formats.JxlHeader(width, height, 1)


def in_parts(stream, size):
    """A codestream in a container, its first part of so many bytes."""
    boxes = formats._JXL_CONTAINER + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
    for number, part in enumerate((stream[:size], stream[size:])):
        boxes += struct.pack(">I4sI", 12 + len(part), b"jxlp", number) + part
    return boxes


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_turn_of_a_jpeg_xl_header_comes_before_exif(turn, monkeypatch):
    """The header by hand: 48 x 32, no defaults, extra fields, the turn."""
    bits = "1" + "11000" + "000" + "10100" + "0" + "1" + f"{turn - 1:03b}"[::-1]
    stream = b"\xff\x0a" + int(bits[::-1], 2).to_bytes(4, "little")
    assert formats.jxl_header(stream + bytes(20)) == formats.JxlHeader(48, 32, turn)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"\xff\x0b", b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\xd8" + bytes(50)]
)
def test_what_is_no_jpeg_xl_has_no_header(content):
    assert formats.jxl_header(content) is None


KINDS = [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ".heic", "pillow-heif"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", ".heic", "pillow-heif"),
    (b"\xff\x0a\x7f\x40", ".jxl", "pillow-jxl-plugin"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", ".jxl", "pillow-jxl-plugin"),
    (b"\0\0\0\x18ftypisom\0\0\0\0", "", ""),
    (b"8BPS", "", ""),
]


@pytest.mark.parametrize(("content", "suffix", "package"), KINDS)
def test_without_its_plugin_a_kind_is_named_with_what_would_read_it(monkeypatch, content, suffix, package):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    bare = runpy.run_path(formats.__file__)
    assert not {"HEIF", "JXL"} & {*bare["FORMATS"]}
    assert bare["suffix_of"](content) == suffix
    if package:
        assert suffix in bare["UNREADABLE_SUFFIXES"]
        assert f"pip install {package}, the extra formats" in bare["named"](suffix)
    for name in ("FORMATS", "UNREADABLE_SUFFIXES", "named"):
        monkeypatch.setattr(images, name, bare[name])
    with pytest.raises(images.ImageError, match="not a readable JPEG, PNG") as error:
        images.decode(content + bytes(60))
    assert (package or "image;") in str(error.value)


def test_the_extra_brings_every_package_that_a_sentence_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = {name.partition(">")[0] for name in project["optional-dependencies"]["formats"]}
    assert {*runpy.run_path(formats.__file__)["_MISSING"].values()} == brought


@pytest.mark.parametrize("suffix", [".HEIC", ".heif", ".hif", ".jxl"])
def test_a_folder_names_what_would_read_its_files(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    bare = runpy.run_path(formats.__file__)
    for name in ("SUFFIXES", "UNREADABLE_SUFFIXES", "named"):
        monkeypatch.setattr(f"lora_utils.data.sources.file_tree.{name}", bare[name])
    for name in (f"photo{suffix}", "a.png"):
        (tmp_path / name).write_bytes(save(PICTURE))
        (tmp_path / name).with_suffix(".txt").write_text("a photo", encoding="utf-8")
    found = find_examples(DataConfig(train_data_dir=[tmp_path]))
    assert [example.source for example in found.examples] == ["a.png"]
    [finding] = found.findings
    assert f"({suffix[1:].upper()}: pip install pillow-" in finding.problem
    assert "the extra formats" in finding.problem
