"""Image files as pixels: a file's bytes in, sRGB out, and every change on the way told.

An image is used as it is, used after a change that `Decoded.changes` names, or refused. Every CRC of a PNG is
checked, and a file cut short is refused. What no reader can see: other formats' pixels carry no checksum, so
a bit flipped in a JPEG or a lossy WebP that still decodes is not found. Worker processes import this file, so
it imports no torch.
"""

import os
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
from PIL import Image, ImageChops, ImageCms, ImageColor, UnidentifiedImageError, features

from lora_utils import UserError
from lora_utils.data.findings import Finding, fixed, refused

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64 * 10**6
_TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels"
_AVIF = "avif" in features.modules and bool(features.check("avif"))
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF") + ("AVIF",) * _AVIF
SUFFIXES = frozenset(
    (".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .gif .tif .tiff" + " .avif" * _AVIF).split()
)
_NOT_READ = (
    ".ai .arw .avif .cr2 .cr3 .dds .dib .dng .emf .eps .exr .hdr .heic .heif .icns .ico .j2k .jp2 .jpx .jxl "
    ".nef .orf .pbm .pcx .pdf .pgm .pnm .ppm .ps .psb .psd .qoi .raf .raw .rw2 .srw .svg .svgz .tga .wmf .xcf"
)
UNREADABLE_SUFFIXES = frozenset(_NOT_READ.split()) - SUFFIXES  # to be refused by name, not passed over
_GREY16 = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", *_GREY16)
_UPRIGHT = dict(
    zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True)
)  # EXIF (CIPA DC-008)
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
        # Folders are resolved once: this runs for every image on every start.
        target = _resolve(path.parent) / path.name
        trusted = _resolve(root)
        status = target.lstat()
        if stat.S_ISLNK(status.st_mode):
            target = path.resolve(strict=True)
            status = target.stat()
        if not target.is_relative_to(trusted):
            raise ImageError("a link that leads out of the data folder", "put the file itself there")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a file but a folder, pipe, socket or device", "remove it")
        if not 0 < status.st_size <= MAX_BYTES:
            size = f"larger than {MAX_BYTES // 2**20} MiB" if status.st_size else "empty (0 bytes)"
            raise ImageError(size, "replace or remove it")
        # Without O_NONBLOCK, a pipe that takes the file's place at this moment would block forever.
        with open(target, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(MAX_BYTES)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = getattr(error, "strerror", 0) or error
        raise ImageError(f"cannot be opened ({reason})", "check or remove it") from error


@lru_cache(maxsize=256)
def _resolve(folder: Path) -> Path:
    return folder.resolve(strict=True)


def read_header(content: bytes) -> Header:
    """Size and transparency, without decoding pixels; raises an ImageError where `decode` needs no pixels for
    it.
    """
    with _reading():
        image, orientation, _ = _probe(BytesIO(content))
        tags = getattr(
            image, "tag_v2", None
        )  # of a TIFF, whose sides newer versions of Pillow have already swapped
        width, height = (tags[256], tags[257]) if tags else image.size
        return Header(
            # Orientations from 5 on lie on their side.
            *((height, width) if orientation >= 5 else (width, height)),
            image.has_transparency_data,
        )


def decode(content: bytes, background: str = "white") -> Decoded:
    """All pixels as sRGB, upright, with transparency laid over the background.

    Raises:
        ImageError: It is damaged, no image of our formats, or has too many pixels or pixels of an unusual
            kind.
    """
    backdrop = ImageColor.getrgb(background)[:3]
    with _reading():
        file = BytesIO(content)
        probe, orientation, exif_is_damaged = _probe(file)
        if (
            probe.format == "JPEG" and content.find(b"\xff\xd9", file.tell()) < 0
        ):  # no end mark behind the header
            raise ImageError("damaged (cut short)", "replace or remove it")
        # It closes the file, so the image is opened once more below.
        probe.verify()  # every CRC of a PNG
        changes = [fixed("damaged EXIF", "used what could be read of it")] if exif_is_damaged else []
        image = Image.open(BytesIO(content), formats=_FORMATS)
        if image.format != "MPO" and getattr(
            image, "is_animated", False
        ):  # MPO: a photo with its smaller copies
            changes.append(fixed("several frames", "used the first"))
        if getattr(image, "dispose_extent", None) not in (None, (0, 0, *image.size)):  # of a GIF
            changes.append(fixed("first frame does not fill the image", "rest left as it is"))
        # All pixels, now: a file that is cut short fails here and not while it is cropped.
        image.load()
        if abs(image.info.get("gamma", 1 / 2.2) * 2.2 - 1) > 0.1 and not image.info.get("icc_profile"):
            changes.append(fixed("gamma of its own", "ignored"))
        icc = image.info.get("icc_profile", b"")
        file_format = image.format  # later images are Pillow's own, and have none
        image, alpha = _split_alpha(image, content[24] if file_format == "PNG" else 8)
        if image.mode in _GREY16:
            image = _to_8_bits(image, changes)
        image = _to_srgb(image, icc, changes)
        if alpha and (share := 1 - alpha.histogram()[255] / (alpha.width * alpha.height)):
            image.paste(backdrop, mask=ImageChops.invert(alpha))
            changes.append(
                fixed(f"transparent pixels ({max(1, round(100 * share))} %)", f"laid over {background}")
            )
        if orientation > 1:
            changes.append(fixed(f"EXIF orientation ({orientation})", "turned as its EXIF says"))
            if file_format != "TIFF":  # Pillow itself turns those while it loads them
                image, alpha = (part and part.transpose(_UPRIGHT[orientation]) for part in (image, alpha))
        return Decoded(image, alpha, tuple(changes))


@contextmanager
def _reading() -> Iterator[None]:
    """Turns what Pillow raises into ImageErrors and silences what it only warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError as error:
            raise ImageError(_TOO_LARGE, "make it smaller") from error
        except UnidentifiedImageError as error:
            raise ImageError(f"not a readable {', '.join(_FORMATS)} image", "convert or remove it") from error
        except _PILLOW_ERRORS as error:
            reason = " ".join((str(error) or type(error).__name__).split())
            raise ImageError(f"damaged ({reason})", "replace or remove it") from error


def _probe(file: BytesIO) -> tuple[Image.Image, int, bool]:
    """The image with its pixels undecoded, its orientation, and whether its EXIF is damaged."""
    image = Image.open(file, formats=_FORMATS)
    content = file.getvalue()
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than the image
    if max(image.width * image.height, int(tags.get(322, 0)) * int(tags.get(323, 0))) > MAX_PIXELS:
        raise ImageError(f"{_TOO_LARGE} ({image.width} × {image.height})", "make it smaller")
    # Floats, 32-bit colours and the like have no agreed range.
    if image.mode not in _MODES:
        raise ImageError(f"unusual pixels ({image.mode})", "save it as 8-bit RGB")
    late = max(
        content.rfind(b"eXIfMM\0*", -(2**17)), content.rfind(b"eXIfII*\0", -(2**17))
    )  # behind a PNG's pixels
    said = image.info.get("exif") or (content[late + 4 :] if late > 0 and image.format == "PNG" else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:  # Pillow's own getexif hides damage, and decodes a PNG
            exif = Image.Exif() if said else Image.Image.getexif(image)
            if said:
                exif.load(said)
            orientation = exif.get(0x0112) or 1
        except _PILLOW_ERRORS:
            orientation = -1
    return (image, int(orientation), bool(caught)) if orientation in range(1, 9) else (image, 1, True)


def _split_alpha(image: Image.Image, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """Colours and alpha; `bits` per sample are what the transparent colour of a PNG is given in."""
    key = image.info.get("transparency", 0)
    if not image.has_transparency_data:
        return image, None
    if image.mode not in ("1", "L", "RGB", *_GREY16):
        return image.convert("L" if image.mode == "LA" else "RGB"), image.convert("RGBA").getchannel("A")
    if image.mode == "RGB" and bits == 16:
        raise ImageError("a transparent colour of 16 bits", "save it with an alpha channel")
    if bits < 8:  # Pillow widens the pixels to 8 bits, but not this colour
        key = min(255, key * 255 // (2**bits - 1))
    shown = np.atleast_3d(np.asarray(image.convert("L") if image.mode == "1" else image) != key).any(axis=2)
    return image, Image.fromarray(shown.view(np.uint8) * np.uint8(255))


def _to_8_bits(image: Image.Image, changes: list[Finding]) -> Image.Image:
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    low = int(values.min())
    high = int(values.max())
    if low < 0 or high > 65535 or (image.mode == "I" and high < 256):
        raise ImageError(f"32-bit grey (range {low}–{high})", "save it with 8 or 16 bits")
    # Scanners and cameras write 12 bits into 16.
    white = 4095 if tags.get(258) == (12,) else 65535
    table = np.minimum((np.arange(65536) * 255 + white // 2) // white, 255).astype(np.uint8)
    changes.append(fixed(f"16-bit grey (range {low}–{high})", "scaled to 8 bits"))
    return Image.fromarray((255 - table if tags.get(262) == 0 else table)[values])  # 0 is white in some TIFFs


def _to_srgb(image: Image.Image, icc: bytes, changes: list[Finding]) -> Image.Image:
    """The embedded profile decides; without one, grey and RGB are taken for sRGB and CMYK is inverted."""
    if icc != b"":
        try:
            profile = ImageCms.ImageCmsProfile(BytesIO(icc))
            name = " ".join(ImageCms.getProfileDescription(profile).split())
            # What the profile itself says that it is for, bytes 16 to 19 of its header.
            mode = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}[icc[16:20]]
            if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and image.mode not in ("1", "L")):
                raise ValueError("made for other colours")
            if mode != "RGB" or "sRGB" not in name:
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
