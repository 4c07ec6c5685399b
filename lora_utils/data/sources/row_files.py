"""Rows of table files: CSV in its dialects, JSON lines, parquet. A bad line is refused by its number.

Everything in a CSV is text: None, NA and 007 are captions like others, whatever a library would make of them.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_utils.data.captions import TextError, decode_text
from lora_utils.data.examples import DataError
from lora_utils.data.findings import Remarks

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def read_lines(path: Path, name: str, remarks: Remarks) -> list[tuple[str, dict[str, Any]]]:
    """Every row by column, with what the user knows it by, such as 'metadata.csv line 3'.

    Args:
        path: The file; its ending says how to read it.
        name: What the user knows the file by.
        remarks: Takes up bad lines.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    # Own readers: datasets gives up at the first bad line, unnamed.
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    try:
        return list(readers[path.suffix.lower()](path, name, remarks))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{name} cannot be opened ({reason}); make it readable, or remove it") from error


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
    # From the header alone, as captions are full of commas. Excel writes semicolons in half of Europe, and
    # understands a line before the header that says so.
    told = re.match(r"[\r\n]*\"?sep=([,;\t|])\"?[\r\n]+", text)
    if told:
        text = text[told.end() :]
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    delimiter = told[1] if told else max(_DELIMITERS, key=header.count)
    # Strict, or a quote that never ends would swallow all following rows into one caption.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    # Not a for loop, which an error would end: the rows behind a bad one can still be used.
    while True:
        line = reader.line_num + (2 if told else 1)
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
