"""CSV files of a dataset, read as those of folders are; and which tables beside images are about them.

The library datasets takes None and NA for nothing and digits for numbers, and knows no semicolons.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import TextError
from lora_utils.data.examples import DataError
from lora_utils.data.findings import Remarks
from lora_utils.data.formats import SUFFIXES
from lora_utils.data.sources.arrow_types import is_binary
from lora_utils.data.sources.columns import choose_caption_column
from lora_utils.data.sources.file_tree import CAPTION_ENDINGS
from lora_utils.data.sources.names import Names
from lora_utils.data.sources.row_files import read_lines

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

CSV_ENDINGS = (".csv", ".tsv")


def csv_files(builder: "DatasetBuilder") -> dict[str, list[Path]]:
    """The files of every split of a dataset that is made of plain CSV files; empty for any other.

    Those of the Hub are fetched into its cache.
    """
    from datasets import DownloadManager
    from datasets.packaged_modules.csv.csv import Csv, CsvConfig

    if not isinstance(builder, Csv) or not isinstance(builder.config, CsvConfig):
        return {}
    # A dataset card may say how its files are to be read, and then the library knows better.
    plain = CsvConfig()
    has_own_rules = any(
        getattr(builder.config, name) != getattr(plain, name)
        for name in ("sep", "header", "names", "skiprows")
    )
    data_files: Any = builder.config.data_files or {}
    splits = {str(split): [str(file) for file in files] for split, files in data_files.items()}
    # Not those in an archive (zip://a.csv::b.zip), nor packed ones.
    files = [file for files in splits.values() for file in files]
    if has_own_rules or not all(file.lower().endswith(CSV_ENDINGS) and "::" not in file for file in files):
        return {}
    fetched: Any = DownloadManager().download(splits)
    return {split: [Path(file) for file in files] for split, files in fetched.items()}


def load_csv(files: Mapping[str, Sequence[Path]], split: str, remarks: Remarks) -> "Dataset":
    """Rows of CSV files as a dataset whose columns are all text.

    Args:
        files: Those of every split.
        split: A split, or a part of it, such as train[:500].
        remarks: Takes up bad lines.

    Raises:
        DataError: A file cannot be read.
        ValueError: There is no such split, or nothing in it; in the words of datasets.
    """
    from datasets import Dataset, ReadInstruction, concatenate_datasets

    wanted = ReadInstruction.from_spec(split)
    tables = {
        name: _read(paths, remarks) if name in split else Dataset.from_dict({})
        for name, paths in files.items()
    }
    parts = []
    for part in wanted.to_absolute({name: len(table) for name, table in tables.items()}):
        parts.append(tables[part.splitname].select(range(part.from_, part.to)))
    if not any(map(len, parts)) and any(map(len, tables.values())):
        raise ValueError(f"Instruction {split} corresponds to no data")
    return concatenate_datasets(parts)


def _read(paths: Sequence[Path], remarks: Remarks) -> "Dataset":
    from datasets import Dataset, Features, Value

    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += [values for _, values in read_lines(path, path.name, remarks)]
        except DataError as error:
            if isinstance(error.__cause__, TextError):
                raise DataError(f"{path} is {error.__cause__}; save its files as UTF-8") from error
            raise
    columns = dict.fromkeys(column for row in rows for column in row)
    features = Features({column: Value("string") for column in columns})
    return Dataset.from_dict(
        {column: [row.get(column) for row in rows] for column in columns}, features=features
    )


def tables_of_images(
    folder: Path, tables: Sequence[PurePosixPath], files: Collection[PurePosixPath], config: DataConfig
) -> list[PurePosixPath]:
    """The tables of a folder that say which of its images are learned; notes and results do not.

    Args:
        folder: The dataset.
        tables: Its tables, relative to it.
        files: All of its files, likewise.
        config: May name the columns.
    """
    with_images = [table for table in tables if _holds_bytes(folder / table)]
    # Caption files say it already, unless the user speaks of columns.
    speaks_of_columns = config.image_column is not None or config.caption_column is not None
    if with_images or (_are_captioned(files) and not speaks_of_columns):
        return with_images
    names = Names(file.as_posix() for file in files if file.suffix.lower() in SUFFIXES)
    return [table for table in tables if _describes(folder / table, names, config)]


def _are_captioned(files: Collection[PurePosixPath]) -> bool:
    texts = {file.with_suffix("") for file in files if file.suffix.lower() in CAPTION_ENDINGS}
    return any(file.with_suffix("") in texts for file in files if file.suffix.lower() in SUFFIXES)


def _holds_bytes(path: Path) -> bool:
    """Whether a table has more than text and numbers in it; a damaged one is for the user to see."""
    import pyarrow
    from pyarrow import parquet, types

    if path.suffix.lower() != ".parquet":
        return path.suffix.lower() == ".arrow"
    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError, pyarrow.ArrowException):
        return True
    return any(is_binary(field.type) or types.is_struct(field.type) for field in schema)


def _describes(path: Path, names: Names, config: DataConfig) -> bool:
    """Whether a table names an image, and may have captions."""
    rows = _rows(path)
    cells = (
        value.replace("\\", "/").strip() for row in rows for value in row.values() if isinstance(value, str)
    )
    if not any(names.find(cell) or names.find_below(cell, "") for cell in cells):
        return False
    examples = {column: value for row in reversed(rows) for column, value in row.items() if value}
    if config.instance_prompt is not None or config.caption_column in examples:
        return True
    try:
        return choose_caption_column(None, examples, path.name) is not None
    except DataError:  # two of them: whoever reads the table asks which
        return True


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; none where it is something else, which the folder's own look tells."""
    try:
        if path.suffix.lower() != ".json":
            return [values for _, values in read_lines(path, path.name, Remarks())]
        values = json.loads(path.read_text(encoding="utf-8"))
    except (DataError, OSError, ValueError, RecursionError):
        return []
    return [row for row in values if isinstance(row, dict)] if isinstance(values, list) else []
