"""Texts of any script on pictures: each letter by a font that has it, long words broken, never a box.

A *letter* is what a reader takes for one: a character with its accents, or emojis joined to one.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from matplotlib import get_data_path
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont, features

FONT_PX = 13
LINE_PX = 17
ELLIPSIS = "…"
BREAKS_AFTER = (",;|", r"/:_+)\-")
"""Where a word that is too long is broken first, then next: between tags without spaces, within them."""
JOINERS = "\u200c\u200d"
PLACEHOLDERS = ("lastresort", "blank", "fallback", "tofu", "notdef", "barcode")
"""In names of fonts that have a box, or nothing at all, for every character there is."""
STYLES = ("bold", "italic", "oblique", "thin", "light", "black", "mono", "serif", "condensed", "narrow")


def drawable(text: str) -> str:
    """What of a text the fonts of this machine can draw, on one line; … stands for what they cannot.

    Empty where neither a letter nor a figure would be left.
    """
    words = " ".join(unicodedata.normalize("NFC", text).split())
    kept = []
    for letter in _letters("".join(character for character in words if not _is_invisible(character))):
        if letter.isspace() or _font_for(letter):
            kept.append(letter)
        elif kept[-1:] != [ELLIPSIS]:
            kept.append(ELLIPSIS)
    remains = any(letter.isalnum() or _is_symbol(letter) for letter in kept)
    return "".join(kept).strip() if remains or ELLIPSIS not in kept else ""


def wrapped(text: str, width_px: int, most_lines: int) -> list[str]:
    """A drawable text in lines that fit; of a text that is too long the beginning, and an ellipsis."""
    lines: list[str] = []
    for gap, piece in _pieces(text, width_px):
        if lines and width(lines[-1] + gap + piece) <= width_px:
            lines[-1] += gap + piece
        else:
            lines.append(piece)
    if len(lines) <= most_lines:
        return lines

    lines = lines[:most_lines]
    last = list(_letters(lines[-1]))
    while last and width("".join(last).rstrip() + ELLIPSIS) > width_px:
        last.pop()
    lines[-1] = "".join(last).rstrip() + ELLIPSIS
    return lines


def width(text: str) -> float:
    """Of a drawable line, in pixels."""
    return sum(font.getlength(part) for part, font in _runs(text))


def write_line(pen: ImageDraw.ImageDraw, left_px: float, top_px: float, text: str, colour: str) -> None:
    """Draw one drawable line."""
    runs = list(_runs(text))
    # Within a run the layout engine turns right-to-left scripts; the order of the runs is ours.
    if _is_right_to_left(text):
        runs.reverse()
    for part, font in runs:
        # Fonts differ in height: what they share is the line that letters stand on.
        pen.text((left_px, top_px + FONT_PX), part, colour, font, anchor="ls")
        left_px += font.getlength(part)


def _pieces(text: str, width_px: int) -> Iterator[tuple[str, str]]:
    """What may stand on a line of its own, each with what goes between it and the one before it."""
    for word in text.split():
        gap = " "
        for piece in _parts_of(word, width_px):
            yield gap, piece
            gap = ""


def _parts_of(word: str, width_px: int, breaks: Sequence[str] = BREAKS_AFTER) -> Iterator[str]:
    """A word whole, or where it is too long its parts, or where they are too long their letters."""
    if width(word) <= width_px:
        yield word
    elif not breaks:
        yield from _letters(word)
    else:
        for part in re.findall(f"[^{breaks[0]}]*[{breaks[0]}]|[^{breaks[0]}]+", word):
            yield from _parts_of(part, width_px, breaks[1:])


def _letters(text: str) -> Iterator[str]:
    letter = ""
    for character in text:
        is_part = unicodedata.category(character)[0] == "M" or character in JOINERS
        is_skin = "\U0001f3fb" <= character <= "\U0001f3ff"
        if letter and not (is_part or is_skin or letter[-1] == "\u200d"):
            yield letter
            letter = ""
        letter += character
    if letter:
        yield letter


def _runs(text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Parts of a drawable text that one font draws: shaping and kerning need neighbours together."""
    by_font = groupby(_letters(text), key=lambda letter: _font_for(letter) or _usual_font())
    for font, letters in by_font:
        yield "".join(letters), font


@cache
def _font_for(letter: str) -> ImageFont.FreeTypeFont | None:
    """The first font that can draw a letter; None where this machine has none."""
    # Without the library for bidirectional text its letters would stand apart and in the wrong order.
    if not _lays_out_any_script() and any(map(_needs_layout, letter)):
        return None
    if any(unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") for character in letter):
        return None  # what has no meaning of its own: some fonts put pictures there
    fonts = filter(None, map(_opened, (_usual_path(), *_system_paths())))
    return next((font for table, font in fonts if _has_letter(table, font, letter)), None)


def _has_letter(table: FT2Font, font: ImageFont.FreeTypeFont, letter: str) -> bool:
    has_all = all(table.get_char_index(ord(character)) for character in letter if character not in JOINERS)
    # Some fonts claim every character, and leave it blank.
    return has_all and (letter.isspace() or font.getmask(letter).getbbox() is not None)


def _is_invisible(character: str) -> bool:
    """Marks of direction, which could turn a whole label, and what chooses between two looks of a letter."""
    if character in JOINERS:
        return not _lays_out_any_script()
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _needs_layout(character: str) -> bool:
    return unicodedata.bidirectional(character) in ("R", "AL")


def _is_right_to_left(text: str) -> bool:
    strong = (unicodedata.bidirectional(character) for character in text)
    return next((direction for direction in strong if direction in ("L", "R", "AL")), "L") != "L"


def _is_symbol(letter: str) -> bool:
    return unicodedata.category(letter[0]) in ("So", "Sm", "Sc")


@cache
def _lays_out_any_script() -> bool:
    return bool(features.check("raqm") and features.check("fribidi"))


@cache
def _opened(path: str) -> tuple[FT2Font, ImageFont.FreeTypeFont] | None:
    """A font's table of characters, and the font itself; None where it cannot be drawn at this size."""
    try:
        return FT2Font(path), ImageFont.truetype(path, FONT_PX)
    except (OSError, RuntimeError, ValueError):  # damaged, or pictures of another size, as coloured emojis
        return None


@cache
def _usual_font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_usual_path(), FONT_PX)


def _usual_path() -> str:
    """Pillow's own font lacks most letters; matplotlib, which notebooks need anyway, brings a better one."""
    return str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def _system_paths() -> Sequence[str]:
    """Fonts of this machine, plain ones first."""
    paths = {path: Path(path).stem.lower() for path in findSystemFonts()}
    usable = [path for path in paths if not any(word in paths[path] for word in PLACEHOLDERS)]

    def preference(path: str) -> tuple[int, bool, str]:
        name = paths[path].replace("sansserif", "sans")
        return sum(style in name for style in STYLES), "sans" not in name, path

    return sorted(usable, key=preference)
