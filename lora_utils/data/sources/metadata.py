"""What metadata files say about the images of a folder.

A file describes images in its own folder and below. Rows about the same image add up, from whichever file:
equal ones count once, different captions are several captions of the image.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import Captioner, TextError, decode_text
from lora_utils.data.examples import DataError
from lora_utils.data.findings import Remarks
from lora_utils.data.sources.columns import choose_caption_column, choose_image_column, refuse_columns
from lora_utils.data.sources.file_tree import FileTree, file_problem, name_problem, trusted_root

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


@dataclass(frozen=True)
class Row:
    """One line about one image."""

    source: str
    """'metadata.jsonl line 3'; rows of parquet files count from 0, as datasets does."""
    file_name: Any
    """As it stands there; need not be text, nor name an image."""
    caption: Any
    """As it stands there: a text, a list of texts, or anything else that is to be refused."""


def read_rows(path: Path, name: str, config: DataConfig, remarks: Remarks) -> tuple[list[Row], str]:
    """The rows of a file and the name of its column of captions; bad lines are refused one by one.

    Args:
        path: The file; its ending says how to read it.
        name: What the user knows the file by.
        config: May name the columns.
        remarks: Takes up bad lines.

    Raises:
        DataError: The file as a whole cannot be used, or a column cannot be found.
    """
    # Own readers: datasets gives up at the first bad line, unnamed.
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        rows = list(readers[path.suffix.lower()](path, name, remarks))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{name} cannot be opened ({reason}); make it readable, or remove it") from error
    if not rows:
        remarks.refuse(name, "metadata without a usable row", "write one row for each image, or remove it")
        return [], ""

    # For the message about columns: the first value of each that is not empty, as a line may lack keys.
    examples: dict[str, Any] = {}
    for _, values in rows:
        for column, value in values.items():
            if examples.get(column) in (None, ""):
                examples[column] = value
    image = choose_image_column(config.image_column, examples, (), name)
    if image is None:
        refuse_columns("image_column", "no column file_name", examples, name)
    # Without the column of images, which caption_column must not be advised to name.
    others = {column: value for column, value in examples.items() if column != image}
    caption = choose_caption_column(config.caption_column, others, name)
    if caption is None and config.instance_prompt is None:
        refuse_columns("caption_column", "no column of captions", others, name)
    if caption is None:
        remarks.notice(name, "metadata without a column of captions", "not used")
        return [], ""

    return [Row(source, values.get(image), values.get(caption)) for source, values in rows], caption


def _read_jsonl(path: Path, name: str, remarks: Remarks) -> Iterator[tuple[str, dict[str, Any]]]:
    action = 'write {"file_name": "a.png", "text": "…"} on one line'
    # Not splitlines: JSON may hold U+2028 within a text, and splitlines would cut there.
    for number, line in enumerate(_read_text(path, name, remarks).split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{name} line {number}"
        try:
            values = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:  # RecursionError: "[[[[…" without end
            remarks.refuse(source, f"not JSON ({error})", action)
            continue
        if isinstance(values, dict):
            yield source, values
        else:
            remarks.refuse(source, "not a JSON object", action)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys in silence; which one was meant only the user knows.
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _read_csv(path: Path, name: str, remarks: Remarks) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _read_text(path, name, remarks)
    # From the header alone, as captions are full of commas. Excel writes semicolons in half of Europe.
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    # Strict, or a quote that never ends would swallow all following rows into one caption.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    # Not a for loop, which an error would end: the rows behind a bad one can still be used.
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            remarks.refuse(f"{name} line {line}", f"not CSV ({error})", 'double every " inside "quotes"')
            continue
        if fields is None:
            return
        if not fields:  # an empty line
            continue

        if not columns:
            columns = [column.strip() for column in fields]
            if len(set(columns)) < len(columns):
                raise DataError(
                    f"two columns of {name} have the same name ({', '.join(columns)}); rename one"
                )
        elif len(fields) == len(columns):
            yield f"{name} line {line}", dict(zip(columns, fields, strict=True))
        else:
            problem = f"wrong number of fields ({len(fields)} instead of {len(columns)})"
            # Nearly always a comma in a caption. Joining the rest would be a guess, and is not made.
            action = f'put "quotes" around captions with a {_DELIMITERS[delimiter]}'
            remarks.refuse(f"{name} line {line}", problem, action)


def _read_text(path: Path, name: str, remarks: Remarks) -> str:
    # An error here, a refusal for a caption file: without its metadata most of a folder lacks captions.
    try:
        text, encoding = decode_text(path.read_bytes())
    except TextError as error:
        raise DataError(f"{name} is {error}; save it as UTF-8") from error
    if encoding != "UTF-8":
        remarks.fix(name, f"{encoding} text", "converted")
    return text


def _read_parquet(path: Path, name: str, remarks: Remarks) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # here, as only a few folders need it and it takes a while to load
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                rows += batch.to_pylist()
    # The last two: text that is not UTF-8, dates beyond all.
    except (pyarrow.ArrowException, ValueError, ArithmeticError) as error:
        raise DataError(f"{name} cannot be read as parquet ({error}); write it anew, or remove it") from error

    for number, values in enumerate(rows):
        yield f"{name} row {number}", values


class Metadata:
    """The rows of all metadata files of a tree, by image."""

    rows: dict[str, list[Row]]
    """By name of the image relative to the tree."""
    origins: list[str]
    """What captions come from, such as 'metadata.jsonl (column text)'."""

    def __init__(self, tree: FileTree, config: DataConfig, remarks: Remarks) -> None:
        """Read the files.

        Args:
            tree: The folder whose metadata files are read.
            config: May name the columns.
            remarks: Takes up rows that lead to no image.

        Raises:
            DataError: One cannot be used, or there are two in one folder.
        """
        self.rows = {}
        self.origins = []
        self._files: dict[str, str] = {}  # by folder
        images = set(tree.images)
        for file in tree.metadata:
            folder = posixpath.dirname(file)
            if folder in self._files:
                raise DataError(f"{tree.root} holds both {self._files[folder]} and {file}; keep one of them")
            finding = file_problem(tree.root / file, trusted_root(tree.root))
            if finding:
                raise DataError(f"{tree.prefix + file} cannot be used ({finding.problem}); {finding.action}")

            self._files[folder] = file
            rows, column = read_rows(tree.root / file, tree.prefix + file, config, remarks)
            if column:
                self.origins.append(f"{tree.prefix + file} (column {column})")
            for row in rows:
                image = _find_image(row, folder, remarks)
                if image in images:
                    self.rows.setdefault(image, []).append(row)
                # Of an image that was refused its own remark says enough.
                elif image and image not in tree.unusable:
                    problem = f"row without image ({row.file_name:.60})"
                    remarks.refuse(row.source, problem, "put the image there, or remove the row")

    def captions(self, rows: list[Row], captioner: Captioner) -> tuple[str, ...]:
        """The captions in the rows about one image; empty when they were refused."""
        first = rows[0]
        seen: set[str] = set()
        captions: list[Any] = []
        for row in rows:
            # Compared by repr, because lists cannot be in a set, and 1 and True would be equal.
            text = repr(row.caption)
            if text in seen:
                captioner.remarks.notice(
                    row.source, f"repeated row ({first.source} is the first)", "used once"
                )
            elif seen:
                problem = f"another row about the same image ({first.source} is the first)"
                captioner.remarks.notice(row.source, problem, "a further caption of it")
            if text not in seen and row.caption is not None:
                captions += row.caption if isinstance(row.caption, list) else [row.caption]
            seen.add(text)
        return captioner.caption(first.source, captions, "write what the image shows into the row")

    def file_of(self, image: str) -> str | None:
        """The nearest metadata file that should describe an image."""
        for parent in PurePosixPath(image).parents:
            folder = parent.as_posix() if parent.name else ""  # pathlib writes "." for the tree itself
            if folder in self._files:
                return self._files[folder]
        return None


def _find_image(row: Row, folder: str, remarks: Remarks) -> str:
    """The image's name relative to the tree; empty when the row was refused."""
    name = row.file_name
    if not isinstance(name, str) or not name.strip():
        remarks.refuse(
            row.source, f"row without file name ({name!r:.40})", "write the image's file name into it"
        )
        return ""
    finding = name_problem(name)
    if finding:
        remarks.add(finding.of(row.source))
        return ""

    # Tables made on Windows; on Linux a backslash is part of a name, but nobody means that.
    if "\\" in name:
        remarks.fix(row.source, f"backslash in a file name ({name:.60})", "read as slash")
    return posixpath.normpath(posixpath.join(folder, name.strip().replace("\\", "/")))
