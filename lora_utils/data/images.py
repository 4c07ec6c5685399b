"""Image files as pixels: a file's bytes in, sRGB out, and every change on the way told.

An image is used as it is, used after a change that `Decoded.changes` names, or refused. Every CRC of a PNG
is checked, and a file cut short is refused. What no reader can see: other formats' pixels carry no checksum,
so a bit flipped in a JPEG or a lossy WebP that still decodes is not found. Worker processes import this file,
so it imports no torch.
"""

import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageColor, PngImagePlugin, UnidentifiedImageError

from lora_utils import UserError
from lora_utils.data.findings import Finding, fixed, refused
from lora_utils.data.formats import FORMATS, jxl_header, named, png_exif, suffix_of
from lora_utils.data.formats import SUFFIXES as SUFFIXES
from lora_utils.data.formats import UNREADABLE_SUFFIXES as UNREADABLE_SUFFIXES
from lora_utils.system.portable import open_descriptor

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64 * 10**6  # 192 MB as RGB, and decoding holds several copies of it
_TEXT_BYTES = 16 * 2**20
_MOST_DENSE = 200
"""Packed text or a profile in a PNG that is larger, and larger than this many times its file, is a bomb."""
_TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels"
_GREY16 = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", *_GREY16)
_SRGB_OF_JXL = re.compile(r"(RGB_D65_SRG|Gra_D65)_(Rel|Per|Sat|Abs)_SRG")  # as libjxl calls what it writes
_ORIENTATION = 0x0112  # of EXIF (CIPA DC-008); 1 is upright, and from 5 on width and height change places
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF (TIFF 6.0), which Pillow gives by number.
_WIDTH = 256
_HEIGHT = 257
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_TILE_WIDTH = 322
_TILE_HEIGHT = 323
# Its readers raise all of these on damaged files; none of them means a fault of ours here.
_PILLOW_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(AssertionError, MemoryError, RuntimeError, struct.error, zlib.error, ImageCms.PyCMSError),
)


class ImageError(UserError):
    """An image cannot be used: what is wrong with it, and what to do."""

    def __init__(self, problem: str, action: str) -> None:
        """Take both apart, as a finding has them; together they are the message."""
        super().__init__(problem, action)  # both, or a worker process could not send it
        self.problem = problem
        self.action = action

    def __str__(self) -> str:
        return f"{self.problem}; {self.action}"

    def finding(self, source: str = "") -> Finding:
        """As what was found wrong with a file."""
        return refused(self.problem, self.action).of(source)


@dataclass(frozen=True)
class Header:
    """Width and height in pixels, as displayed, and whether the file knows transparency."""

    width: int
    height: int
    has_alpha: bool


@dataclass(frozen=True)
class Decoded:
    """Upright RGB without transparency, the alpha it had (mode L), and what was changed on the way."""

    image: Image.Image
    alpha: Image.Image | None
    changes: tuple[Finding, ...]


def read_bytes(path: Path, root: Path) -> bytes:
    """The content of a regular file inside `root`, whatever links lead to it.

    Raises:
        ImageError: It is missing, no regular file, empty, huge or unreadable, or lies outside of `root`.
    """
    try:
        # Folders are resolved once: this runs for every image on every start. By absolute names: the same
        # relative one means another folder after a notebook's %cd.
        target = _resolve(path.parent.absolute()) / path.name
        trusted = _resolve(root.absolute())
        status = target.lstat()
        if stat.S_ISLNK(status.st_mode):
            target = path.resolve(strict=True)
            status = target.stat()

        # Checked on resolved names: a data set from elsewhere must not read this user's other files.
        if not target.is_relative_to(trusted):
            raise ImageError("a link that leads out of the data folder", "put the file itself there")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a file but a folder, pipe, socket or device", "remove it")
        if not 0 < status.st_size <= MAX_BYTES:
            size = f"larger than {MAX_BYTES // 2**20} MiB" if status.st_size else "empty (0 bytes)"
            raise ImageError(size, "replace or remove it")

        # A pipe may take the file's place at this moment, and would block forever.
        with open(target, "rb", opener=open_descriptor) as file:
            return file.read(MAX_BYTES)
    # ValueError: a NUL in the name. RuntimeError: links in a circle, before Python 3.13.
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot be opened ({reason})", "check or remove it") from error


@lru_cache(maxsize=256)
def _resolve(folder: Path) -> Path:
    return folder.resolve(strict=True)


def read_header(content: bytes) -> Header:
    """Size and transparency, without decoding pixels.

    Raises:
        ImageError: As ``decode``, where no pixels are needed to see it.
    """
    with _reading(content):
        image, orientation, _ = _probe(BytesIO(content))
        width, height = image.size
        tags = getattr(image, "tag_v2", None)
        if tags:  # of a TIFF, whose sides newer versions of Pillow have already swapped
            width = tags[_WIDTH]
            height = tags[_HEIGHT]
        if orientation >= 5:
            return Header(height, width, image.has_transparency_data)
        return Header(width, height, image.has_transparency_data)


def decode(content: bytes, background: str = "white") -> Decoded:
    """All pixels as sRGB, upright, with transparency laid over the background.

    Args:
        content: The encoded image file.
        background: A colour by a name or code that PIL knows.

    Raises:
        ImageError: It is damaged, no image of our formats, or has too many or unusual pixels.
    """
    backdrop = ImageColor.getrgb(background)[:3]
    with _reading(content):
        orientation, changes = _check(content)
        image = Image.open(BytesIO(content), formats=FORMATS)  # anew: verifying has used up the first one
        changes += _peculiarities(image)
        image.load()
        if abs(image.info.get("gamma", 1 / 2.2) * 2.2 - 1) > 0.1 and not image.info.get("icc_profile"):
            changes.append(fixed("gamma of its own", "ignored"))

        # Both before any conversion: its result has no format and may have lost its profile.
        icc = image.info.get("icc_profile", b"")
        file_format = image.format
        # Alpha first: colour profiles and the scaling of 16 bits know colours only.
        image, alpha = _split_alpha(image, content[24] if file_format == "PNG" else 8)  # 24: IHDR's bit depth
        if image.mode in _GREY16:
            image = _to_8_bits(image, changes)
        image = _to_srgb(image, icc, changes)

        # After the conversion, as the background's colour is given in sRGB.
        if alpha is not None:
            transparent = 1 - alpha.histogram()[255] / (alpha.width * alpha.height)
            if transparent:
                image.paste(backdrop, mask=ImageChops.invert(alpha))
                percent = max(1, round(100 * transparent))
                changes.append(fixed(f"transparent pixels ({percent} %)", f"laid over {background}"))

        if orientation > 1:
            changes.append(fixed(f"EXIF orientation ({orientation})", "turned as its EXIF says"))
            if file_format != "TIFF":  # Pillow itself turns those while it loads them
                image = image.transpose(_UPRIGHT[orientation])
                alpha = alpha and alpha.transpose(_UPRIGHT[orientation])
        return Decoded(image, alpha, tuple(changes))


def _check(content: bytes) -> tuple[int, list[Finding]]:
    """The EXIF orientation, 1 to 8, and what is wrong with it; raises where decoding would hide damage."""
    file = BytesIO(content)
    probe, orientation, exif_is_damaged = _probe(file)
    # libjpeg fills up what is missing with grey. The end mark must stand behind the header, since a thumbnail
    # in EXIF has one of its own.
    if probe.format == "JPEG" and content.find(b"\xff\xd9", file.tell()) < 0:
        raise ImageError("damaged (cut short)", "replace or remove it")
    probe.verify()  # every CRC of a PNG
    changes = []
    if exif_is_damaged:
        changes.append(fixed("damaged EXIF", "used what could be read of it"))
    return orientation, changes


def _peculiarities(image: Image.Image) -> list[Finding]:
    """What an image that is not loaded yet holds besides one picture that fills it."""
    changes = []
    # MPO: a photo with its smaller copies, which nobody misses.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        changes.append(fixed("several frames", "used the first"))
    if getattr(image, "dispose_extent", None) not in (None, (0, 0, *image.size)):  # of a GIF
        changes.append(fixed("first frame does not fill the image", "rest left as it is"))
    return changes


@contextmanager
def _reading(content: bytes) -> Iterator[None]:
    """Turns what Pillow raises into ImageErrors and silences what it only warns of."""
    # Pillow's own limit is 1 MiB for a text or profile of a PNG, which workflows and camera profiles exceed.
    limit = max(_TEXT_BYTES, min(_MOST_DENSE * len(content), MAX_BYTES))
    PngImagePlugin.MAX_TEXT_CHUNK = limit
    PngImagePlugin.MAX_TEXT_MEMORY = limit
    # Its warnings would reach the terminal once for each damaged file, without the file's name.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError as error:
            raise ImageError(_TOO_LARGE, "make it smaller") from error
        except UnidentifiedImageError as error:
            suffix = suffix_of(content)
            hint = f" ({named(suffix)})" if suffix in UNREADABLE_SUFFIXES else ""
            problem = f"not a readable {', '.join(FORMATS)} image{hint}"
            raise ImageError(problem, "convert or remove it") from error
        except _PILLOW_ERRORS as error:
            reason = " ".join((str(error) or type(error).__name__).split())
            raise ImageError(f"damaged ({reason})", "replace or remove it") from error


def _probe(file: BytesIO) -> tuple[Image.Image, int, bool]:
    """The image with its pixels undecoded, its orientation, and whether its EXIF is damaged."""
    header = jxl_header(file.getvalue())
    if header is not None:  # before its reader decodes it
        _require_few_pixels(header.width, header.height)
    image = Image.open(file, formats=FORMATS)
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than the image
    tile_px = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_HEIGHT, 0))
    _require_few_pixels(image.width, image.height, tile_px)
    if image.mode not in _MODES:
        raise ImageError(f"unusual pixels ({image.mode})", "save it as 8-bit RGB")

    exif_bytes = image.info.get("exif")
    if not exif_bytes and image.format == "PNG":
        exif_bytes = png_exif(file.getvalue())
    # Pillow only warns of a tag that it cannot read, and the orientation may be that tag.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:  # Pillow's own getexif hides damage, and decodes a PNG
            if exif_bytes:
                exif = Image.Exif()
                exif.load(exif_bytes)
            else:
                exif = Image.Image.getexif(image)
            orientation = exif.get(_ORIENTATION) or 1  # some write 0
        except _PILLOW_ERRORS:
            orientation = -1
    if orientation not in range(1, 9):
        return image, 1, True
    # JPEG XL's decoder has turned it by the header, except where a whole JPEG lies in the file.
    if header is not None and header.orientation > 1 and not getattr(image, "jpeg", False):
        orientation = 1
    return image, int(orientation), bool(caught)


def _require_few_pixels(width: int, height: int, tile_px: int = 0) -> None:
    if max(width * height, tile_px) > MAX_PIXELS:
        raise ImageError(f"{_TOO_LARGE} ({width} × {height})", "make it smaller")


def _split_alpha(image: Image.Image, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """Colours and alpha; `bits` per sample are what the transparent colour of a PNG is given in."""
    key = image.info.get("transparency", 0)
    if not image.has_transparency_data:
        return image, None

    # An alpha channel, or a palette with one: Pillow converts these right.
    if image.mode not in ("1", "L", "RGB", *_GREY16):
        return image.convert("L" if image.mode == "LA" else "RGB"), image.convert("RGBA").getchannel("A")

    # One colour that stands for transparency. Pillow keeps 8 of 16 bits, so other colours would vanish too.
    if image.mode == "RGB" and bits == 16:
        raise ImageError("a transparent colour of 16 bits", "save it with an alpha channel")
    if bits < 8:  # Pillow widens the pixels to 8 bits, but not this colour
        key = min(255, key * 255 // (2**bits - 1))
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)  # "1" would compare as bool
    is_shown = np.atleast_3d(samples != key).any(axis=2)
    return image, Image.fromarray(is_shown.view(np.uint8) * np.uint8(255))


def _to_8_bits(image: Image.Image, changes: list[Finding]) -> Image.Image:
    """16-bit grey by its full range, not by the values that occur, so that a dark picture stays dark."""
    values = np.asarray(image)
    low = int(values.min())
    high = int(values.max())
    # Mode I is 32 bits, but a PNG of 16 bits has it too; beyond 65535 or below 256 it cannot be one.
    if low < 0 or high > 65535 or (image.mode == "I" and high < 256):
        raise ImageError(f"32-bit grey (range {low}–{high})", "save it with 8 or 16 bits")

    tags = getattr(image, "tag_v2", {})  # of a TIFF
    white = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    # Pillow's own convert("L") cuts off at 255 in place of scaling.
    shades = np.minimum((np.arange(65536) * 255 + white // 2) // white, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white in some TIFFs
        shades = 255 - shades
    changes.append(fixed(f"16-bit grey (range {low}–{high})", "scaled to 8 bits"))
    return Image.fromarray(shades[values])


def _to_srgb(image: Image.Image, icc: bytes, changes: list[Finding]) -> Image.Image:
    """The embedded profile decides; without one, grey and RGB are taken for sRGB and CMYK is inverted."""
    if icc != b"":
        try:
            profile = ImageCms.ImageCmsProfile(BytesIO(icc))
            name = " ".join(ImageCms.getProfileDescription(profile).split())
            mode = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}[icc[16:20]]
            if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and image.mode not in ("1", "L")):
                raise ValueError("made for other colours")
            # sRGB's own profile would change values by rounding alone, and every photo would need a remark.
            if not ((mode == "RGB" and "sRGB" in name) or _SRGB_OF_JXL.fullmatch(name)):
                colours = image.convert(mode)
                srgb = ImageCms.createProfile("sRGB")
                image = ImageCms.profileToProfile(colours, profile, srgb, outputMode="RGB") or image
                problem = "CMYK colours" if mode == "CMYK" else f"colour profile ({name})"
                changes.append(fixed(problem, "converted to sRGB"))
        except _PILLOW_ERRORS:
            changes.append(fixed("unusable colour profile", "ignored"))
    if image.mode == "CMYK":
        changes.append(fixed("CMYK colours", "converted without a profile"))
    return image.convert("RGB")
