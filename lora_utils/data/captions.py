"""Caption text: decoded, cleaned, with trigger word, in several orders.

A caption is one line of text. White space inside it is collapsed, as the tokenizer would do anyway; NFC
normalisation is not done. In a caption file every line that is not empty is a caption of its own.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from math import factorial, prod
from pathlib import Path
from typing import Any

from lora_utils.config.data import DataConfig
from lora_utils.data.findings import Remarks

MAX_CHARACTERS = 10_000
_MAX_FILE_BYTES = 1_000_000
TRIGGER = "[trigger]"


class TextError(Exception):
    """Bytes that are not text; the message is what is wrong with them."""


def decode_text(content: bytes) -> tuple[str, str]:
    """Text and its encoding: UTF-8 with or without a byte-order mark, or UTF-16 with one.

    Raises:
        TextError: Any other encoding.
    """
    encoding = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "UTF-8"
    try:
        text = content.decode("utf-16" if encoding == "UTF-16" else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TextError(f"text that is not {encoding} (line {line})") from None
    if "\0" in text:
        raise TextError(f"text with NUL bytes (line {text.partition(chr(0))[0].count(chr(10)) + 1})")
    return text, encoding


def clean_caption(text: str) -> tuple[str, str]:
    """The caption on one line, and the invisible characters that were taken out, as 'U+200B, U+0007'.

    Those are control and format characters (Unicode's Cc and Cf: zero-width spaces, direction marks) and lone
    surrogates (Cs), which a JSON escape can make and which no file can hold.
    """
    invisible = {
        char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs") and not char.isspace()
    }
    visible = "".join(char for char in text if char not in invisible) if invisible else text
    return " ".join(visible.split()), ", ".join(f"U+{ord(char):04X}" for char in sorted(invisible))


@dataclass(frozen=True)
class Captioner:
    """Makes captions of whatever text came with an image, and remarks on what is wrong with it."""

    remarks: Remarks
    instance_prompt: str | None
    """Caption of images that have none."""

    def caption(self, source: str, value: Any, cure: str) -> tuple[str, ...]:
        """The captions in a text or a list of texts; empty when it was refused.

        Args:
            source: What the text is part of, for remarks.
            value: From a file, a table cell or the user's code.
            cure: What the user could do about an empty caption.
        """
        texts = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        if odd := [text for text in texts if not isinstance(text, str)]:
            problem = f"caption that is no text ({_kind(odd[0])})"
            return self._refuse(source, problem, "make it text in quotes")
        if longest := max((len(text) for text in texts if len(text) > MAX_CHARACTERS), default=0):
            problem = f"caption of more than {MAX_CHARACTERS:,} characters ({longest:,})"
            return self._refuse(source, problem, "shorten it")
        cleaned = [clean_caption(text) for text in texts]
        if removed := ", ".join(dict.fromkeys(marks for _, marks in cleaned if marks)):
            self.remarks.fix(source, f"invisible characters ({removed})", "removed")
        captions = [text for text, _ in cleaned if text]
        if not captions:
            return self._empty(source, cure)
        if "\N{REPLACEMENT CHARACTER}" in "".join(captions):
            self.remarks.notice(
                source, "damaged letters (\N{REPLACEMENT CHARACTER})", "used as they are; correct them"
            )
        different = tuple(dict.fromkeys(captions))
        if len(different) < len(captions):
            self.remarks.tally(source, "the same caption twice", "used once")
        if len(different) > 1:
            self.remarks.tally(source, "several captions", "each visit of the image picks one")
        return different

    def missing(self, source: str, problem: str, cure: str) -> tuple[str, ...]:
        """The captions of an image that came without text."""
        if self.instance_prompt is None:
            return self._refuse(source, problem, f"{cure}, or set instance_prompt")
        self.remarks.tally(source, problem, "instance_prompt is used")
        return (self.instance_prompt,)

    def read(self, path: Path, source: str) -> tuple[str, ...]:
        """The captions in a text file, one on each line."""
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            problem = f"caption file that cannot be opened ({error.strerror})"
            return self._refuse(source, problem, f"make {path.name} readable")
        if len(content) > _MAX_FILE_BYTES:
            return self._refuse(source, "caption file of more than 1 MB", f"shorten {path.name}")
        try:
            text, encoding = decode_text(content)
        except TextError as error:
            return self._refuse(source, str(error), f"save {path.name} as UTF-8")
        if encoding != "UTF-8":
            self.remarks.fix(source, f"{encoding} text", "converted")
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        return self.caption(source, lines, f"write what it shows into {path.name}")

    def _empty(self, source: str, cure: str) -> tuple[str, ...]:
        if self.instance_prompt is None:
            return self._refuse(source, "empty caption", f"{cure}, or set instance_prompt")
        self.remarks.fix(source, "empty caption", "instance_prompt is used")
        return (self.instance_prompt,)

    def _refuse(self, source: str, problem: str, action: str) -> tuple[str, ...]:
        self.remarks.refuse(source, problem, action)
        return ()


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)


def caption_variants(caption: str, config: DataConfig) -> list[str]:
    """The texts that one caption is encoded as: with trigger word and, when tags are shuffled, in several orders.

    The first is the original order. Tags with the trigger word lead, and keep_tokens counts them. An order depends on
    the caption and its number alone, so that a new seed needs no new encoding; and on no library's random numbers.
    """
    trigger = " ".join((config.trigger_word or "").split())
    caption = _add_trigger(caption, trigger)
    if not config.shuffle_caption:
        return [caption]
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    words = [word.strip() for word in trigger.split(",") if word.strip()]
    lead = [tag for tag in tags if any(_holds(tag, word) for word in words)]
    tags = lead + [tag for tag in tags if tag not in lead]
    kept = max(len(lead), config.keep_tokens)
    front, rest = tags[:kept], tags[kept:]
    possible = factorial(len(rest)) // prod(factorial(count) for count in Counter(rest).values())
    orders: dict[str, None] = {", ".join(tags) or caption: None}
    number = 0
    while len(orders) < min(config.caption_variants, possible):
        number += 1
        orders[", ".join(front + _shuffle(rest, f"{number} {caption}"))] = None
    return list(orders)


def _add_trigger(caption: str, trigger: str) -> str:
    if not trigger:
        return caption
    caption = caption.replace(TRIGGER, trigger)
    return caption if _holds(caption, trigger) else f"{trigger}, {caption}"


def _holds(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _shuffle(tags: list[str], salt: str) -> list[str]:
    places = sorted(range(len(tags)), key=lambda place: hashlib.sha256(f"{place} {salt}".encode()).digest())
    return [tags[place] for place in places]
