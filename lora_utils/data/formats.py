"""Which image formats can be read here, and what a file says before any reader opens it.

JPEG XL's reader decodes all of a file to tell its size, so its header (ISO/IEC 18181-1, annex D) is read
here.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import features

# Pillow is told these: its other readers, such as EPS, which runs Ghostscript, are never tried on a file.
_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_MISSING: dict[str, str] = {}
"""What would read a kind of file, by its ending."""

_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_JXL = b"\xff\x0a"
_JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"

# The extra ``formats`` brings the last two; a platform may have no build of one, or one that does not load.
if "avif" in features.modules and features.check("avif"):
    _FORMATS.append("AVIF")
    _SUFFIXES.add(".avif")
try:
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()
    _FORMATS.append("HEIF")
    _SUFFIXES.update(_HEIF_SUFFIXES)
except ImportError:
    _MISSING |= dict.fromkeys(_HEIF_SUFFIXES, "pillow-heif")
try:  # to import it is to register it
    import pillow_jxl  # noqa: F401  # pyright: ignore[reportMissingImports]

    _FORMATS.append("JXL")
    _SUFFIXES.add(".jxl")
except ImportError:
    _MISSING[".jxl"] = "pillow-jxl-plugin"

FORMATS = tuple(_FORMATS)
SUFFIXES = frozenset(_SUFFIXES)
_NOT_READ = (
    ".ai .arw .avif .cr2 .cr3 .dds .dib .dng .emf .eps .exr .hdr .heic .heif .hif .icns .ico .j2k .jp2 .jpx "
    ".jxl .nef .orf .pbm .pcx .pdf .pgm .pnm .ppm .ps .psb .psd .qoi .raf .raw .rw2 .srw .svg .svgz .tga "
    ".wmf .xcf"
)
UNREADABLE_SUFFIXES = frozenset(_NOT_READ.split()) - SUFFIXES  # to be refused by name, not passed over


def named(suffix: str) -> str:
    """A kind that cannot be read, by its ending, with what would read it: 'PSD', 'HEIC: pip install …'."""
    name = suffix[1:].upper()
    package = _MISSING.get(suffix.lower())
    return f"{name}: pip install {package}, the extra formats, would read it" if package else name


def suffix_of(content: bytes) -> str:
    """The ending that a file without a reader here should have, '.heic' or '.jxl'; '' for all others."""
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        return ".heic"
    return ".jxl" if content.startswith((_JXL, _JXL_CONTAINER)) else ""


def png_exif(content: bytes) -> bytes | None:
    """EXIF of a PNG; what lies behind its pixels Pillow finds only once they are decoded."""
    start = 8
    while start + 8 <= len(content):
        size, name = struct.unpack_from(">I4s", content, start)
        if name == b"eXIf":
            return content[start + 8 : start + 8 + size]
        start += 12 + size  # with the length, the name and the CRC
    return None


@dataclass(frozen=True)
class JxlHeader:
    """Sides in pixels as they are stored, and the turn that every decoder applies, as EXIF counts them."""

    width: int
    height: int
    orientation: int


_HEADER_BYTES = 16  # more than size and orientation ever take
# Width to height, by the code of a JPEG XL header.
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def jxl_header(content: bytes) -> JxlHeader | None:
    """What a JPEG XL file says first; None for other files."""
    stream = content if content.startswith(_JXL) else _codestream(content)
    if not stream.startswith(_JXL):
        return None
    bits = _bits(stream[2:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0"))
    is_multiple_of_8 = _number(bits, 1)
    height = _side(bits, is_multiple_of_8)
    ratio = _RATIOS.get(_number(bits, 3))
    width = height * ratio[0] // ratio[1] if ratio else _side(bits, is_multiple_of_8)
    is_default = _number(bits, 1)
    has_orientation = not is_default and _number(bits, 1)
    return JxlHeader(width, height, 1 + _number(bits, 3) if has_orientation else 1)


def _codestream(content: bytes) -> bytes:
    """The first bytes of the pixels within a container, which is a row of boxes."""
    stream = b""
    start = 0
    while content.startswith(_JXL_CONTAINER) and start + 16 <= len(content) and len(stream) < _HEADER_BYTES:
        size, name = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1:
            [size] = struct.unpack_from(">Q", content, start + 8)
            head = 16
        end = start + size if size else len(content)
        if end < start + head:
            break
        if name in (b"jxlc", b"jxlp"):
            head += 4 * (name == b"jxlp")  # a part of them, after its number
            stream += content[start + head : min(end, start + head + _HEADER_BYTES)]
        start = end
    return stream


def _bits(content: bytes) -> Iterator[int]:
    """Lowest first, as JPEG XL packs them."""
    return (byte >> place & 1 for byte in content for place in range(8))


def _number(bits: Iterator[int], count: int) -> int:
    return sum(next(bits) << place for place in range(count))


def _side(bits: Iterator[int], is_multiple_of_8: int) -> int:
    if is_multiple_of_8:
        return 8 * (1 + _number(bits, 5))
    return 1 + _number(bits, (9, 13, 18, 30)[_number(bits, 2)])
