"""Caption text: decoded, cleaned, with trigger word, in several orders.

A caption is one line of text. White space inside it is collapsed, as the tokenizer would do anyway; NFC
normalisation is not done. In a caption file every line that is not empty is a caption of its own, or all of
them are one: tools write both, so caption_lines says which, and what looks like the other is told.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from math import factorial, prod
from pathlib import Path
from typing import Any

from lora_utils.config.data import CaptionLines, DataConfig
from lora_utils.data.findings import Remarks

# CLIP reads 77 tokens, so a text this long is a document that was taken for a caption.
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
    # Nothing is guessed: Latin-1 decodes every byte, so a wrong guess would train on garbled letters.
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "UTF-16"
        codec = "utf-16"
    else:
        encoding = "UTF-8"
        codec = "utf-8-sig"  # takes off the mark that Windows' editors put in front
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TextError(f"text that is not {encoding} (line {line})") from None

    # UTF-16 or UTF-32 without a mark is valid UTF-8 as long as its letters are Latin: only the NULs tell.
    if "\0" in text:
        line = text.partition("\0")[0].count("\n") + 1
        raise TextError(f"text with NUL bytes (line {line})")
    return text, encoding


def caption_form(text: str) -> str:
    """What the lines of a caption file look like where they are one caption; empty where they may be more.

    That is how captioners answer: in JSON, in wrapped tags, in paragraphs, under headings.
    """
    bare = text.strip()
    if re.fullmatch(r"(?s)\{.*\".*\}|\[.*\".*\]|```.*```", bare):
        return "JSON"
    if re.search(r"(?m)^(Negative prompt: |Steps: \d+, )", bare):  # below pictures of stable-diffusion-webui
        return "generation settings"
    if re.search(r",[ \t]*[\r\n]", bare):
        return "wrapped tags"
    if re.search(r"(?m)^[ \t]*([-*•#]|\d+[.)])[ \t]|^\*\*|^[\w ]{1,30}:([ \t]|\r?$)", bare):
        return "a list with headings"
    lines = [line for line in re.split(r"[\r\n]+", bare) if line.strip()]
    if len(lines) > 4 and max(map(len, lines)) <= 25:
        return "a tag on each"
    # A blank line alone parts short captions as well.
    has_sentence = re.search(r"(?m)[.!?。！？][\"'”’)]*[ \t]*\r?$|^.{80}", bare)
    if has_sentence and re.search(r"\n[ \t]*\r?\n", bare):
        return "paragraphs"
    return ""


def clean_caption(text: str) -> tuple[str, str]:
    """The caption on one line, and the invisible characters that were taken out, as 'U+200B, U+0007'.

    Those are control and format characters (Unicode's Cc and Cf: zero-width spaces, direction marks) and lone
    surrogates (Cs), which a JSON escape can make and which no file can hold.
    """
    # Line breaks and tabs are control characters too, but they become spaces below and deserve no remark.
    invisible = {
        char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs") and not char.isspace()
    }
    visible = "".join(char for char in text if char not in invisible)
    marks = ", ".join(f"U+{ord(char):04X}" for char in sorted(invisible))
    return " ".join(visible.split()), marks


@dataclass(frozen=True)
class Captioner:
    """Makes captions of whatever text came with an image, and remarks on what is wrong with it."""

    remarks: Remarks
    instance_prompt: str | None
    """Caption of images that have none."""
    lines: CaptionLines = "each"
    """What the lines of a caption file are: a caption each, or together one."""

    def caption(self, source: str, value: Any, cure: str) -> tuple[str, ...]:
        """The captions in a text or a list of texts; empty when it was refused.

        Args:
            source: What the text is part of, for remarks.
            value: From a file, a table cell or the user's code.
            cure: What the user could do about an empty caption.
        """
        texts = list(value) if isinstance(value, list | tuple) else [value]
        # An empty cell of a list: what a table has for captions that were not written.
        written = [text for text in texts if text is not None]
        if written and len(written) < len(texts):
            self.remarks.tally(source, "nothing among several captions", "the others are used")
        texts = written

        # A number is refused, not turned into text: it is a label, and the wrong column was chosen.
        for text in texts:
            if not isinstance(text, str):
                problem = f"caption that is no text ({_type_name(text)})"
                return self._refuse(source, problem, "make it text in quotes")
        longest = max(map(len, texts), default=0)
        if longest > MAX_CHARACTERS:
            problem = f"caption of more than {MAX_CHARACTERS:,} characters ({longest:,})"
            return self._refuse(source, problem, "shorten it")
        return self._clean(source, texts, cure)

    def missing(self, source: str, problem: str, cure: str) -> tuple[str, ...]:
        """The captions of an image that came without text."""
        if self.instance_prompt is None:
            return self._refuse(source, problem, f"{cure}, or set instance_prompt")
        # Counted, not listed: DreamBooth folders hold no text at all, and that is what their owner means.
        self.remarks.tally(source, problem, "instance_prompt is used")
        return (self.instance_prompt,)

    def read(self, path: Path, source: str) -> tuple[str, ...]:
        """The captions in a text file: one on each line, or one on all of them."""
        try:
            # One byte beyond the limit says that there is more, however large the file is.
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

        # Not splitlines: it also splits at form feeds and U+2028, which are white space inside a caption.
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        self._remark_on_form(source, text, len(lines))
        cure = f"write what it shows into {path.name}"
        return self.caption(source, lines if self.lines == "each" else " ".join(lines), cure)

    def _remark_on_form(self, source: str, text: str, count: int) -> None:
        """Remark on a caption file that is not what it is taken for."""
        form = caption_form(text)
        if form in ("JSON", "generation settings"):
            self.remarks.tally(
                source, f"caption that looks like {form}", "used as text; keep the words alone"
            )
        if form and count > 1 and self.lines == "each":
            problem = f"lines that look like one caption ({form})"
            self.remarks.tally(source, problem, "used as one caption each; caption_lines=one makes them one")

    def _clean(self, source: str, texts: list[str], cure: str) -> tuple[str, ...]:
        captions: list[str] = []
        removed: list[str] = []
        for text in texts:
            caption, marks = clean_caption(text)
            if marks:
                removed.append(marks)
            if caption:
                captions.append(caption)

        if removed:
            marks = ", ".join(dict.fromkeys(removed))
            self.remarks.fix(source, f"invisible characters ({marks})", "removed")
        if not captions:
            return self._empty(source, cure)
        # An editor wrote this where it had lost a letter; what stood there cannot be known here.
        if "\N{REPLACEMENT CHARACTER}" in "".join(captions):
            self.remarks.notice(
                source, "damaged letters (\N{REPLACEMENT CHARACTER})", "used as they are; correct them"
            )

        # A caption that stands there twice would be picked twice as often, and encoded twice.
        different = tuple(dict.fromkeys(captions))
        if len(different) < len(captions):
            self.remarks.tally(source, "the same caption twice", "used once")
        if len(different) > 1:
            self.remarks.tally(source, "several captions", "each visit of the image picks one")
        return different

    def _empty(self, source: str, cure: str) -> tuple[str, ...]:
        if self.instance_prompt is None:
            return self._refuse(source, "empty caption", f"{cure}, or set instance_prompt")
        # Named, unlike a missing caption: somebody made the file, and may have forgotten to fill it.
        self.remarks.fix(source, "empty caption", "instance_prompt is used")
        return (self.instance_prompt,)

    def _refuse(self, source: str, problem: str, action: str) -> tuple[str, ...]:
        self.remarks.refuse(source, problem, action)
        return ()


def _type_name(value: Any) -> str:
    # In the words of JSON and CSV, which the user wrote; not of Python, which made this of them.
    names = {bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)


def caption_variants(caption: str, config: DataConfig) -> list[str]:
    """The texts that one caption is encoded as: with trigger word and, when tags are shuffled, reordered.

    The first is the original order. Tags with the trigger word lead, and keep_tokens counts them. An order
    depends on the caption and its number alone, so that a new seed needs no new encoding; and on no library's
    random numbers, so that a new version of one needs none either.
    """
    trigger = " ".join((config.trigger_word or "").split())
    caption = _add_trigger(caption, trigger)
    if not config.shuffle_caption:
        return [caption]

    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    words = [word.strip() for word in trigger.split(",") if word.strip()]
    # CLIP's earlier tokens weigh more, so the new concept stays in front whatever is shuffled behind it.
    lead = [tag for tag in tags if any(_holds(tag, word) for word in words)]
    tags = lead + [tag for tag in tags if tag not in lead]
    kept = max(len(lead), config.keep_tokens)
    front = tags[:kept]
    rest = tags[kept:]

    # The number of distinct orders is a multinomial coefficient; asking for more would never end.
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
    # Not \b: it knows no border behind "c++" or before "#1", and such trigger words exist.
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _shuffle(tags: list[str], salt: str) -> list[str]:
    # Sorting by hashes is a shuffle that every platform and version repeats, unlike random.shuffle.
    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{index} {salt}".encode()).digest()

    return [tags[index] for index in sorted(range(len(tags)), key=draw)]
