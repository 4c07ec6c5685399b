"""Consoles that cannot show every letter, or are not there at all: printing to them never ends a run."""

import codecs
import os
import sys
from typing import Any, TextIO

_ERRORS = "lora_utils.plain"
"""Name of the error handler of codecs."""
# Of Python's own error handlers, those that raise.
_RAISING = ("strict", "surrogateescape", "surrogatepass")
_PLAIN = {
    "█": "#",
    "–": "-",
    "—": "-",
    "−": "-",
    "×": "x",
    "·": ".",
    "²": "2",
    "…": "...",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "“": '"',
    "”": '"',
}
"""What our own sentences and bars hold beyond ASCII."""


def accept_any_text() -> None:
    """From now on stdout and stderr take any text: what one cannot show becomes ``#`` or ``\\u0443``.

    Windows' code pages lack most of the world's letters, the POSIX locale has ASCII alone; a service or a
    closed descriptor leaves no stream at all.
    """
    codecs.register_error(_ERRORS, _in_plain_letters)
    for name in ("stdout", "stderr"):
        setattr(sys, name, _accepting(getattr(sys, name)))


def is_terminal(stream: Any) -> bool:
    """Whether a person looks at it now; streams of notebooks and loggers may not even know the question."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # ValueError: it is closed
        return False


def _accepting(stream: Any) -> Any:
    if stream is None or getattr(stream, "closed", False):
        return open(os.devnull, "w", encoding="utf-8")
    encoding = str(getattr(stream, "encoding", None) or "").lower().replace("_", "-")
    if hasattr(stream, "reconfigure"):
        # Whoever chose a handler that does not raise, with PYTHONIOENCODING, keeps it.
        if stream.errors in _RAISING:
            stream.reconfigure(errors=_ERRORS)
        return stream
    # Notebooks' streams are no files and take all of Unicode.
    return stream if encoding in ("utf-8", "utf8") or isinstance(stream, _Accepting) else _Accepting(stream)


class _Accepting:
    """A stream of unknown make, such as one that copies what is printed into a file of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._stream.write(text.encode("ascii", _ERRORS).decode("ascii"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """In ASCII, which every encoding of a console can write."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = (_PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in letters)
    return "".join(plain), error.end
