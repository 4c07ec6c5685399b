"""Image files of every kind that people bring, drawn here, each with what must become of it."""

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, features

Y, X = np.mgrid[:32, :48]
PICTURE = np.stack((X * 5, Y * 8, 255 - X * 3 - Y * 2), axis=-1).astype(np.uint8)
"""Smooth, so that JPEG keeps it, and different after every turn."""
GREY = PICTURE[..., 0]
HIDDEN = np.broadcast_to(X < 16, GREY.shape)
"""What transparency hides."""
SHOWN = np.where(HIDDEN[..., None], 255, PICTURE).astype(np.uint8)
RAMP = (X * 1390 + Y * 3 + 100).astype(np.uint16)
"""16-bit grey, and the same in 8 bits."""
SCALED = np.rint(RAMP / 257).astype(np.uint8)
STEPS = (X // 12).astype(np.uint8)
"""2-bit grey."""
INDICES = ((X + Y) % 16).astype(np.uint8)
SHADES = INDICES * 17
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BGR = SRGB.replace(b"\0s\0R\0G", b"\0s\0B\0G").replace(b"rXYZ", b"----")
BGR = BGR.replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
"""A profile with red and blue exchanged, so that a picture with exchanged channels looks right."""


@dataclass(frozen=True)
class Case:
    content: bytes
    expectation: str
    """'right', 'fixed: ' and words of a notice, or 'refused: ' and words of the reason."""
    pixels: np.ndarray | None = None
    tolerance: int = 0
    """How far any value may be from `pixels`: 0 where nothing is lost, a few for JPEG."""


def rgb(grey):
    return np.repeat(np.asarray(grey).astype(np.uint8)[..., None], 3, axis=-1)


def save(pixels, file_format="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    target = BytesIO()
    image.save(target, file_format, **options)
    return target.getvalue()


def with_alpha(pixels, alpha):
    return np.dstack((pixels, np.broadcast_to(alpha, pixels.shape[:2]).astype(np.uint8)))


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels, bits=8, colour=2, before=b"", after=b"", steps=((0, 0, 1, 1),)):
    """A PNG of any bit depth, with chunks before and after the pixels; `steps` are passes of interlacing."""
    rows = b""
    for left, top, across, down in steps:
        for row in pixels[top::down, left::across]:
            packed = np.packbits(
                np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - min(bits, 8) :]
            )
            rows += b"\0" + (row.astype(">u2").tobytes() if bits == 16 else packed.tobytes())
    size = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, colour, 0, 0, len(steps) > 1)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + before
    return head + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND")


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def tiff(pixels, photometric=2, order="<", data=None, tags=()):
    """A TIFF whose directory lies before its pixels."""
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if data is None else data
    samples = pixels.shape[2] if pixels.ndim == 3 else 1
    wanted = {256: pixels.shape[1], 257: pixels.shape[0], 258: pixels.itemsize * 8, 259: 1, 262: photometric}
    wanted |= {273: 0, 277: samples, 278: pixels.shape[0], 279: len(data)} | dict(tags)
    wanted[273] = 8 + 2 + 12 * len(wanted) + 4
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(wanted.items()))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "IH", 8, len(wanted)) + entries + bytes(4) + data


def bmp(data, height, compression, bits, colours):
    """A BMP of 48 pixels across; a negative height lies top down."""
    start = 54 + len(colours)
    head = struct.pack(
        "<IiiHHIIiiII", 40, 48, height, 1, bits, compression, len(data), 0, 0, len(colours) // 4, 0
    )
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + colours + data


def key(*colour):
    return chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))


def exif(orientation):
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)


def stored(picture, orientation):
    """The pixels as they lie in a file that EXIF turns into the picture."""
    if orientation >= 5:
        picture = np.swapaxes(picture, 0, 1)
    down = -1 if orientation in (3, 4, 6, 7) else 1
    across = -1 if orientation in (2, 3, 7, 8) else 1
    return np.ascontiguousarray(picture[::down, ::across])


def cyan_only_profile():
    """An ICC profile of CMYK in which cyan alone counts: L* is 100 without it and 0 with all of it."""
    grid = bytes(value for node in range(16) for value in (0 if node & 8 else 255, 128, 128))
    table = (
        b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    )
    table += bytes(range(256)) * 4 + grid + bytes(range(256)) * 3
    head = struct.pack(">I", 144 + len(table)) + b"lcms\x02\x40\0\0prtrCMYKLab " + bytes(12) + b"acsp"
    white = struct.pack(">iii", 63190, 65536, 54061)
    return (
        head.ljust(68, b"\0")
        + white.ljust(60, b"\0")
        + struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
        + table
    )


def jpeg(pixels, **options):
    return save(pixels, "JPEG", **{"quality": 95, "subsampling": 0} | options)


def animated(file_format, **options):
    if file_format == "GIF":
        first = SHADES
        second = Image.fromarray(PICTURE[::-1, ::-1]).quantize(16)
    else:
        first = PICTURE
        second = Image.fromarray(255 - PICTURE)
    return save(first, file_format, save_all=True, append_images=[second], **options)


def cmyk(bands):
    return Image.frombytes("CMYK", (48, 32), np.ascontiguousarray(bands).tobytes())


def cases(expectation, table):
    return {name: Case(file, expectation, *more) for name, (file, *more) in table.items()}


def right():
    """Files that need no change beyond what every reader does."""
    rle = (
        b"".join(bytes(value for index in row for value in (1, index)) + b"\0\0" for row in INDICES[::-1])
        + b"\0\1"
    )
    colours = bytes(value for index in range(16) for value in (index * 17,) * 3 + (0,))
    palette = chunk(b"PLTE", bytes(index * 17 for index in range(16) for _ in "rgb"))
    table = {
        "rgb.png": (png(PICTURE), PICTURE),
        "interlaced.png": (png(PICTURE, steps=ADAM7), PICTURE),
        "16 bit.png": (png(PICTURE * np.uint16(257), 16), PICTURE),
        "2 bit grey.png": (png(STEPS, 2, 0), rgb(STEPS * 85)),
        "1 bit.png": (png(STEPS % 2, 1, 0), rgb(STEPS % 2 * 255)),
        "palette.png": (png(INDICES, 8, 3, palette), rgb(SHADES)),
        "4 bit palette.png": (png(INDICES, 4, 3, palette), rgb(SHADES)),
        "opaque rgba.png": (png(with_alpha(PICTURE, 255), 8, 6), PICTURE),
        "srgb profile.png": (save(PICTURE, icc_profile=SRGB), PICTURE),
        "text behind.png": (png(PICTURE, after=chunk(b"tEXt", b"a\0b")) + b"trailer", PICTURE),
        "really a webp.png": (save(PICTURE, "WEBP", lossless=True), PICTURE),
        "really a png.jpg": (png(PICTURE), PICTURE),
        "444.jpg": (jpeg(PICTURE), PICTURE, 4),
        "420.jpg": (jpeg(PICTURE, subsampling=2), PICTURE, 16),
        "progressive.jpg": (jpeg(PICTURE, progressive=True), PICTURE, 4),
        "grey.jpg": (save(GREY, "JPEG", quality=95), rgb(GREY), 4),
        "film behind.jpg": (jpeg(PICTURE) + b"\0\0ftyp\xff\xda" * 9, PICTURE, 4),
        "phone.jpg": (animated("MPO", quality=95, subsampling=0), PICTURE, 4),
        "lossy.webp": (save(PICTURE, "WEBP", quality=95), PICTURE, 16),
        "24 bit.bmp": (save(PICTURE, "BMP"), PICTURE),
        "32 bit.bmp": (save(with_alpha(PICTURE, 0), "BMP"), PICTURE),
        "top down.bmp": (bmp(PICTURE[..., ::-1].tobytes(), -32, 0, 24, b""), PICTURE),
        "run lengths.bmp": (bmp(rle, 32, 1, 8, colours), rgb(SHADES)),
        "still.gif": (save(SHADES, "GIF"), rgb(SHADES)),
        "raw.tif": (tiff(PICTURE), PICTURE),
        "big endian.tif": (tiff(PICTURE, order=">"), PICTURE),
        "0 is white.tif": (tiff(255 - GREY, 0), rgb(GREY)),
        "jpeg inside.tif": (save(PICTURE, "TIFF", compression="jpeg", quality=95), PICTURE, 16),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        table[f"{compression}.tif"] = (save(PICTURE, "TIFF", compression=compression), PICTURE)
    if "avif" in features.modules and features.check("avif"):
        table["lossy.avif"] = (save(PICTURE, "AVIF", quality=95), PICTURE, 16)
    return cases("right", table)


def turned():
    table = {
        "raw turned.tif": (tiff(stored(PICTURE, 8), tags={274: 8}), PICTURE),
        "turned behind.png": (png(stored(PICTURE, 6), after=chunk(b"eXIf", exif(6)[6:])), PICTURE),
    }
    for turn in range(2, 9):
        pixels = stored(PICTURE, turn)
        table[f"turned {turn}.jpg"] = (jpeg(pixels, exif=exif(turn)), PICTURE, 4)
        table[f"turned {turn}.png"] = (save(pixels, exif=exif(turn)), PICTURE)
        table[f"turned {turn}.tif"] = (
            save(pixels, "TIFF", tiffinfo={274: turn}, compression="tiff_lzw"),
            PICTURE,
        )
    return cases("fixed: turned as its EXIF says", table)


def laid_over_white():
    keyed = np.where(HIDDEN[..., None], (9, 8, 7), PICTURE).astype(np.uint8)
    half = np.rint((PICTURE * 128.0 + 255 * 127) / 255).astype(np.uint8)
    clear = with_alpha(PICTURE, np.where(HIDDEN, 0, 255))
    palette = chunk(b"PLTE", bytes(range(48))) + chunk(b"tRNS", bytes(8) + bytes((255,)) * 8)
    from_palette = np.where(INDICES[..., None] < 8, 255, INDICES[..., None] * 3 + (0, 1, 2))
    table = {
        "rgba.png": (png(clear, 8, 6), SHOWN),
        "half.png": (png(with_alpha(PICTURE, 128), 8, 6), half, 1),
        "grey and alpha.png": (png(clear[..., (0, 3)], 8, 4), rgb(np.where(HIDDEN, 255, GREY))),
        "clear palette.png": (png(INDICES, 8, 3, palette), from_palette),
        "rgb key.png": (png(keyed, before=key(9, 8, 7)), SHOWN),
        "grey key.png": (png(GREY, 8, 0, key(0)), rgb(np.where(GREY, GREY, 255))),
        "2 bit key.png": (png(STEPS, 2, 0, key(1)), rgb(np.where(STEPS == 1, 255, STEPS * 85))),
        "1 bit key.png": (png(STEPS % 2, 1, 0, key(0)), rgb(STEPS * 0 + 255)),
        "16 bit key.png": (png(RAMP, 16, 0, key(100)), rgb(np.where(RAMP > 100, SCALED, 255))),
        "clear.gif": (save(SHADES, "GIF", transparency=0), rgb(np.where(SHADES, SHADES, 255))),
        "clear.webp": (save(clear, "WEBP", lossless=True), SHOWN),
        "clear.tif": (save(clear, "TIFF"), SHOWN),
    }
    return cases("fixed: laid over white", table)


def converted():
    deep = "fixed: scaled to 8 bits"
    inks = "fixed: CMYK"
    plain_inks = "fixed: converted without a profile"
    coloured = "fixed: converted to sRGB"
    unusable = "fixed: unusable colour profile"
    cyan = cmyk(np.dstack((GREY, np.full_like(GREY, 255), GREY * 0, GREY * 0)))
    cyan_only = cyan_only_profile()
    lightness = (100 - GREY / 2.55 + 16) / 116
    linear = np.where(lightness > 6 / 29, lightness**3, (lightness - 4 / 29) * 108 / 841)
    seen = rgb(
        np.rint(255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear))
    )
    plain = cmyk(with_alpha(255 - PICTURE, 0))
    bgr = np.ascontiguousarray(PICTURE[..., ::-1])
    damaged = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200)))
    return {
        "16 bit grey.png": Case(png(RAMP, 16, 0), deep, rgb(SCALED)),
        "16 bit grey.tif": Case(tiff(RAMP, 1), deep, rgb(SCALED)),
        "16 bit grey, big endian.tif": Case(tiff(RAMP, 1, ">"), deep, rgb(SCALED)),
        "16 bit grey, 0 is white.tif": Case(tiff(65535 - RAMP, 0), deep, rgb(SCALED)),
        "16 bits in 32.tif": Case(tiff(RAMP.astype(np.int32), 1, tags={339: 2}), deep, rgb(SCALED)),
        "cmyk.jpg": Case(save(plain, "JPEG", quality=95), plain_inks, PICTURE, 16),
        "cmyk.tif": Case(save(plain, "TIFF"), plain_inks, PICTURE),
        "cmyk profile.tif": Case(save(cyan, "TIFF", icc_profile=cyan_only), inks, seen, 2),
        "cmyk profile.jpg": Case(save(cyan, "JPEG", icc_profile=cyan_only), inks, seen, 16),
        "profile.png": Case(save(bgr, icc_profile=BGR), coloured, PICTURE, 1),
        "profile.jpg": Case(jpeg(bgr, icc_profile=BGR), coloured, PICTURE, 5),
        "profile.tif": Case(save(bgr, "TIFF", icc_profile=BGR), coloured, PICTURE, 1),
        "broken profile.png": Case(png(PICTURE, before=damaged), unusable, PICTURE),
        "unpackable profile.png": Case(png(PICTURE, before=chunk(b"iCCP", b"a\0\0no")), unusable, PICTURE),
        "profile of inks.png": Case(save(PICTURE, icc_profile=cyan_only), unusable, PICTURE),
    }
