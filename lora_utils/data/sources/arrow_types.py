"""Arrow's newer types: views, lists of views, run-end encoding, extensions of other programs.

The library datasets stores some of them as they are and refuses tables with others, whatever their column.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_utils.data.findings import Remarks
from lora_utils.data.sources.file_tree import list_files
from lora_utils.system.files import staged
from lora_utils.system.portable import rename

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, DataType, RecordBatch, Schema

_TABLES = (".parquet", ".arrow")
_COPIED = (*_TABLES, ".csv", ".json", ".jsonl", ".md", ".yaml")
_VIEW_INTS = 4  # of 32 bits for each value of a view: its length, and where it lies


def is_text(data_type: "DataType") -> bool:
    """Whether Arrow holds strings in it."""
    from pyarrow import types

    return types.is_string(data_type) or types.is_large_string(data_type) or types.is_string_view(data_type)


def is_binary(data_type: "DataType") -> bool:
    """Whether Arrow holds bytes in it."""
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(is_such(data_type) for is_such in tests)


def binary_lengths(cells: "ChunkedArray") -> list[int | None]:
    """Bytes of each value, None where there is none; the values are never made objects of Python."""
    import numpy as np
    from pyarrow import compute, types

    if not types.is_binary_view(cells.type):
        return compute.call_function("binary_length", [cells]).to_pylist()
    lengths: list[int | None] = []
    for chunk in cells.chunks:  # of views pyarrow has no lengths
        views = np.frombuffer(chunk.buffers()[1], np.int32).reshape(-1, _VIEW_INTS)
        sizes = views[chunk.offset : chunk.offset + len(chunk), 0].tolist()
        valid = chunk.is_valid().to_pylist()
        lengths += [size if is_valid else None for size, is_valid in zip(sizes, valid, strict=True)]
    return lengths


def plain_copy(path: Path, cache: Path) -> Path:
    """The table file or folder of tables itself, or a copy of it without the types that datasets refuses.

    Args:
        path: A file, or a folder that datasets would load.
        cache: Where datasets keeps its own copies; a copy for each state of the files lies there once.
    """
    names = [path.name]
    root = path.parent
    if path.is_dir():
        root = path
        names = sorted(name for name in list_files(path, "", (), Remarks()) if name.endswith(_COPIED))
    if not any(_refused_columns(root / name) for name in names):
        return path

    states = [(name, (root / name).stat().st_mtime_ns, (root / name).stat().st_size) for name in names]
    digest = hashlib.sha256(repr((root.resolve(), states)).encode("utf-8", "surrogateescape")).hexdigest()
    # In a folder of ours: datasets keeps what it makes of a folder under that folder's name in the cache.
    copy = cache / "plain_types" / digest[:24]
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with staged(copy) as partial:
            for name in names:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                _write_plain(root / name, partial / name)
            rename(partial, copy)
    return copy if path.is_dir() else copy / path.name


def _refused_columns(file: Path) -> list[str]:
    """Columns of a table that datasets cannot load; none of other files, nor of damaged ones."""
    import pyarrow

    if not file.name.endswith(_TABLES):
        return []
    try:
        with _opened(file) as (schema, _):
            return [field.name for field in schema if not _is_known(field.type)]
    except (pyarrow.ArrowException, OSError):
        return []  # datasets says what is wrong with it


@contextmanager
def _opened(file: Path) -> Iterator[tuple["Schema", Iterable["RecordBatch"]]]:
    """The schema of a table file, and its rows, some at a time."""
    import pyarrow
    from pyarrow import ipc, parquet

    if file.name.endswith(".parquet"):
        with parquet.ParquetFile(file) as table:
            yield table.schema_arrow, table.iter_batches(batch_size=100)
        return
    with pyarrow.OSFile(str(file)) as source:
        try:
            reader = ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
            table = ipc.open_file(source)
            yield table.schema, map(table.get_batch, range(table.num_record_batches))
        else:
            yield reader.schema, reader


def _is_known(data_type: "DataType") -> bool:
    import datasets
    import pyarrow

    # It takes a dictionary for its values, and then cannot make views of them.
    if pyarrow.types.is_dictionary(data_type) and data_type.value_type != plain_type(data_type.value_type):
        return False
    try:
        datasets.Features.from_arrow_schema(pyarrow.schema([("column", data_type)]))
    except (ValueError, TypeError, NotImplementedError):
        return False
    return True


def plain_type(data_type: "DataType") -> "DataType":
    """The type that holds the same values, of those that Arrow has had from the start."""
    import pyarrow
    from pyarrow import types

    if isinstance(data_type, pyarrow.BaseExtensionType):
        return plain_type(data_type.storage_type)
    if types.is_dictionary(data_type) or types.is_run_end_encoded(data_type):
        return plain_type(data_type.value_type)
    if types.is_struct(data_type):
        return pyarrow.struct([(field.name, plain_type(field.type)) for field in data_type])
    if types.is_list_view(data_type) or types.is_large_list_view(data_type) or types.is_list(data_type):
        return pyarrow.list_(plain_type(data_type.value_type))
    if types.is_string_view(data_type):
        return pyarrow.string()
    return pyarrow.large_binary() if types.is_binary_view(data_type) else data_type


def _write_plain(file: Path, copy: Path) -> None:
    """A table with plain columns where datasets refuses them; any other file as it is."""
    import pyarrow
    from pyarrow import ipc, parquet

    if not _refused_columns(file):
        shutil.copyfile(file, copy)
        return
    with _opened(file) as (schema, batches):
        fields = [
            field if _is_known(field.type) else pyarrow.field(field.name, plain_type(field.type))
            for field in schema
        ]
        plain = pyarrow.schema(fields, schema.metadata)
        is_parquet = copy.name.endswith(".parquet")
        writer = parquet.ParquetWriter(copy, plain) if is_parquet else ipc.new_stream(str(copy), plain)
        with writer:
            for batch in batches:
                writer.write_batch(_plain_batch(batch, plain))


def _plain_batch(batch: "RecordBatch", schema: "Schema") -> "RecordBatch":
    import pyarrow

    columns: Sequence[Any] = [
        column if column.type == field.type else _plain_column(column, field.type)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pyarrow.record_batch(columns, schema=schema)


def _plain_column(column: Any, data_type: "DataType") -> Any:
    import pyarrow

    # By way of Python's objects: pyarrow's own casts of views that hold nulls give broken lists.
    storage = column.storage if isinstance(column, pyarrow.ExtensionArray) else column
    return pyarrow.array(storage.to_pylist(), data_type)
