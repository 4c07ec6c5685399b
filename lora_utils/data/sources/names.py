"""File names that look the same are the same: é may be one character (Unicode NFC) or e and an accent (NFD).

macOS writes the second, most tables and captions that are made elsewhere the first.
"""

import posixpath
import unicodedata
from collections.abc import Iterable, Iterator


def alike(name: str) -> str:
    """What all names have in common that look like this one."""
    if name.isascii():
        return name
    # Screenshots of macOS have a narrow no-break space before PM, which no table has.
    composed = unicodedata.normalize("NFC", name)
    return "".join(" " if unicodedata.category(char) == "Zs" else char for char in composed)


class Names:
    """Names of files below a folder, to be found by names that look the same."""

    def __init__(self, names: Iterable[str]) -> None:
        """Take them up, relative to the folder and with slashes."""
        self._alike: dict[str, list[str]] = {}
        self._below: dict[str, list[str]] = {}
        for name in names:
            self._alike.setdefault(alike(name), []).append(name)
            self._below.setdefault(alike(posixpath.basename(name)), []).append(name)

    def find(self, name: str) -> list[str]:
        """The file of this very name, else all whose names look like it."""
        names = self._alike.get(alike(name), [])
        return [name] if name in names else names

    def find_below(self, name: str, folder: str) -> list[str]:
        """The files of that name in sub-folders of a folder, which tables often leave out."""
        start = f"{alike(folder)}/" if folder else ""
        return [
            file
            for file in self._below.get(alike(posixpath.basename(name)), [])
            if f"/{alike(file)}".endswith(f"/{alike(name)}") and alike(file).startswith(start)
        ]

    def twins(self) -> Iterator[list[str]]:
        """Every group of different names that look the same."""
        return (names for names in self._alike.values() if len(names) > 1)
