"""Every image is used right, changed with a notice, or refused; nothing is silent, hangs or fills the RAM."""

import os
import pickle
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from lora_utils.data import images
from tests.data import image_corpus as make
from tests.data.image_corpus import PICTURE, RAMP, SHADES, Case, animated, chunk, jpeg, png, save, tiff


def cut_down():
    frames = "fixed: used the first"
    damaged = "fixed: damaged EXIF"
    linear = chunk(b"gAMA", struct.pack(">I", 100000))
    still = save(SHADES, "GIF")
    wide = np.pad(make.rgb(SHADES), ((0, 8), (0, 12), (0, 0)))
    return {
        "film.gif": Case(animated("GIF"), frames, make.rgb(SHADES)),
        "film.png": Case(animated("PNG"), frames, PICTURE),
        "film.webp": Case(animated("WEBP", lossless=True), frames, PICTURE),
        "pages.tif": Case(animated("TIFF"), frames, PICTURE),
        "small frame.gif": Case(
            still[:6] + struct.pack("<HH", 60, 40) + still[10:], "fixed: does not fill", wide
        ),
        "linear light.png": Case(png(PICTURE, before=linear), "fixed: gamma", PICTURE),
        "nonsense exif.jpg": Case(jpeg(PICTURE, exif=b"Exif\0\0nonsense"), damaged, PICTURE, 4),
        "short exif.jpg": Case(jpeg(PICTURE, exif=make.exif(1)[:-7]), damaged, PICTURE, 4),
        "orientation 99.png": Case(save(PICTURE, exif=make.exif(99)), damaged, PICTURE),
    }


def damaged():
    whole = png(PICTURE)
    photo = jpeg(PICTURE)
    packed = zlib.compress(bytes(20 * 2**20))
    table = {
        "cut.png": whole[: len(whole) // 2],
        "no end.png": whole[:-12],
        "wrong crc.png": whole[:-16] + bytes((whole[-16] ^ 1,)) + whole[-15:],
        "cut.jpg": photo[: len(photo) * 3 // 4],
        "zeros behind.jpg": photo[: photo.index(b"\xff\xda") + 40] + bytes(len(photo)),
        "cut.gif": save(SHADES, "GIF")[:-40],
        "cut.webp": save(PICTURE, "WEBP")[:-20],
        "cut.bmp": save(PICTURE, "BMP")[:-200],
        "cut.tif": tiff(PICTURE)[:-200],
        "cut deflate.tif": tiff(PICTURE, data=zlib.compress(PICTURE.tobytes())[:-30], tags={259: 8}),
        "text bomb.png": png(PICTURE, before=chunk(b"zTXt", b"a\0\0" + packed)),
        "profile bomb.png": png(PICTURE, before=chunk(b"iCCP", b"a\0\0" + packed)),
    }
    return {name: Case(file, "refused: damaged") for name, file in table.items()}


def too_large():
    whole = png(PICTURE)
    photo = jpeg(PICTURE)
    film = animated("GIF")
    canvas = b"WEBPVP8X" + struct.pack("<IIQ", 10, 0, 16382 << 24 | 16382)[:-2]
    webp = canvas + save(PICTURE, "WEBP", lossless=True)[12:]
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", 10000, 10000, 1, 0, 0, 0, 0))
    tiles = {259: 8, 322: 20000, 323: 20000, 324: 8, 325: 99}
    table = {
        "bomb.png": whole[:8] + size + chunk(b"IDAT", zlib.compress(bytes(1251 * 10000))) + chunk(b"IEND"),
        "bomb.gif": film[:6] + b"\xff\xff\xff\xff" + film[10:],
        "bomb.jpg": photo.replace(struct.pack(">HH", 32, 48), b"\xff\x00\xff\x00", 1),
        "bomb.bmp": make.bmp(b"", 2**30, 0, 24, b""),
        "bomb.tif": tiff(PICTURE, tags={256: 9000, 257: 9000}),
        "tile bomb.tif": tiff(PICTURE, data=zlib.compress(bytes(2**20)), tags=tiles),
    }
    cases = {name: Case(file, "refused: more than 64 million pixels") for name, file in table.items()}
    return cases | {"bomb.webp": Case(b"RIFF" + struct.pack("<I", len(webp)) + webp, "refused: ")}


def unusual():
    kinds = {
        "float.tif": save(np.ones((8, 8), np.float32), "TIFF"),
        "32 bit.tif": save(RAMP.astype(np.int32) * 9, "TIFF"),
        "negative.tif": save(-RAMP.astype(np.int32), "TIFF"),
        "lab.tif": tiff(PICTURE, 8),
        "16 bit rgb key.png": png(PICTURE * np.uint16(257), 16, before=make.key(1, 2, 3)),
    }
    others = {
        "nothing.png": b"",
        "zeros.jpg": bytes(5000),
        "page.jpg": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "paper.pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        "layers.psd": b"8BPS\0\x01" + bytes(99),
        "plain.ppm": save(PICTURE, "PPM"),
        "icon.ico": save(PICTURE, "ICO", sizes=[(16, 16)]),
        "wrong text crc.png": png(PICTURE, before=chunk(b"tEXt", b"a\0b")[:-1] + b"x"),
        "no pixels.jpg": jpeg(PICTURE)[:4],
    }
    table = {name: Case(file, "refused: save it") for name, file in kinds.items()}
    return table | {name: Case(file, "refused: not a readable") for name, file in others.items()}


USED = (make.right, make.turned, make.laid_over_white, make.converted, cut_down)
CORPUS = {name: case for group in (*USED, damaged, too_large, unusual) for name, case in group().items()}


def outcome(case):
    try:
        header = images.read_header(case.content)
        decoded = images.decode(case.content)
    except images.ImageError as error:
        return f"refused: {error}"
    pixels = np.asarray(decoded.image).astype(int)
    if (
        case.pixels is None
        or pixels.shape != case.pixels.shape
        or np.abs(pixels - case.pixels).max() > case.tolerance
    ):
        return "silently wrong"
    if header != images.Header(*decoded.image.size, decoded.alpha is not None):
        return "another header"
    said = [(change.problem, change.action) for change in decoded.changes]
    return f"fixed: {said}" if said else "right"


def is_as_expected(case):
    verdict, _, words = case.expectation.partition(": ")
    return outcome(case).startswith(verdict) and words in outcome(case)


@pytest.mark.parametrize("name", CORPUS)
def test_each_file_is_used_right_fixed_with_a_notice_or_refused(name):
    assert is_as_expected(CORPUS[name]), outcome(CORPUS[name])


def test_the_whole_corpus_leaves_nothing_silent_and_takes_less_than_1_gb():
    script = (
        "from pathlib import Path; from tests.data.test_images import CORPUS, is_as_expected\n"
        "print(len(CORPUS), sum(map(is_as_expected, CORPUS.values())))\n"
        # Not rusage, which counts the parent's memory too.
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    root = Path(__file__).parents[2]
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=root, timeout=120, text=True)
    files, expected, peak_kib = map(int, printed.split())
    assert files == expected >= 64
    assert peak_kib < 10**9 / 1024


def test_a_message_is_a_reason_and_what_to_do():
    for case in CORPUS.values():
        if case.expectation.startswith("refused"):
            reason, remedy = outcome(case).split("; ")
            assert remedy, reason
            assert "BytesIO" not in reason


def test_alpha_is_kept_and_the_background_can_be_chosen():
    decoded = images.decode(
        png(make.with_alpha(PICTURE, np.where(make.HIDDEN, 0, 255)), 8, 6), background="black"
    )
    assert np.array_equal(decoded.alpha, np.where(make.HIDDEN, 0, 255))
    assert np.array_equal(decoded.image, np.where(make.HIDDEN[..., None], 0, PICTURE))


CUT = ["rgb.png", "444.jpg", "progressive.jpg", "still.gif", "film.gif", "lossy.webp", "clear.webp"]
CUT += ["24 bit.bmp", "run lengths.bmp", "raw.tif", "tiff_lzw.tif", "profile.tif"]


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_anywhere_keeps_its_pixels_or_is_refused(name):
    whole = np.asarray(images.decode(CORPUS[name].content).image)
    for length in range(len(CORPUS[name].content)):
        try:
            assert np.array_equal(images.decode(CORPUS[name].content[:length]).image, whole), length
        except images.ImageError:
            continue


def test_a_png_with_any_bit_flipped_keeps_its_pixels_or_is_refused():
    content = png(PICTURE, after=chunk(b"tEXt", b"a\0b"))
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert np.array_equal(images.decode(bytes(flipped)).image, PICTURE), bit
        except images.ImageError:
            continue


def test_only_whole_regular_files_of_the_folder_are_read(tmp_path, monkeypatch):
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    monkeypatch.chdir(root)  # a socket's path must be short
    Path("a.png").write_bytes(b"pixels")
    Path("inside").symlink_to("a.png")
    assert images.read_bytes(root / "a.png", root) == images.read_bytes(root / "inside", root) == b"pixels"
    (tmp_path / "secret").write_bytes(b"secret")
    Path("outside").symlink_to("../secret")
    Path("parent").symlink_to("..")
    Path("nowhere").symlink_to("gone")
    Path("circle").symlink_to("circle")
    Path("empty").touch()
    os.mkfifo("pipe")
    Path("huge").touch()
    os.truncate("huge", images.MAX_BYTES + 1)
    reasons = dict.fromkeys(("outside", "parent/secret", "../secret"), "leads out of the data folder")
    reasons |= dict.fromkeys(("folder", "pipe", "socket"), "not a file")
    reasons |= dict.fromkeys(("nowhere", "circle", "missing", "nul\0"), "cannot be opened")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, reason in (reasons | {"empty": "empty", "huge": "larger than 256 MiB"}).items():
            with pytest.raises(images.ImageError, match=reason):
                images.read_bytes(root / name, root)


def test_every_ending_is_either_read_or_refused():
    assert not images.SUFFIXES & images.UNREADABLE_SUFFIXES
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= images.SUFFIXES
    assert {".heic", ".heif", ".jxl"} <= images.SUFFIXES | images.UNREADABLE_SUFFIXES
    assert {
        ".raw",
        ".cr2",
        ".nef",
        ".dng",
        ".psd",
        ".svg",
        ".pdf",
    } <= images.UNREADABLE_SUFFIXES
    assert ".avif" in images.SUFFIXES | images.UNREADABLE_SUFFIXES


def test_an_error_reaches_its_parent_process_whole():
    error = pickle.loads(pickle.dumps(images.ImageError("empty", "save it again")))
    assert (error.problem, error.action, str(error)) == ("empty", "save it again", "empty; save it again")
