"""Tables of images and captions: datasets from the Hugging Face Hub and from disk, through datasets.

Nothing of a dataset is executed, and an image is read from its row, or from a file inside the dataset's own
folder or the Hub's cache, never from an address.
"""

import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import Captioner
from lora_utils.data.examples import DataError, Example
from lora_utils.data.findings import Finding, Remarks, noticed, refused
from lora_utils.data.images import MAX_BYTES, ImageError, read_bytes
from lora_utils.data.sources.arrow_types import binary_lengths, is_binary, is_text
from lora_utils.data.sources.columns import choose_caption_column, choose_image_column, refuse_columns
from lora_utils.data.sources.file_tree import file_problem, list_files, name_problem, trusted_root
from lora_utils.data.sources.hub import load_table
from lora_utils.data.sources.names import Names, alike

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray

_BATCH_ROWS = 1000  # a column of images is never in memory as a whole, and a batch of it is
_PREFIX = "zip://"
# What zipfile raises of a damaged archive; RuntimeError of a locked one, LookupError of an absent member.
_FAILURES = (
    *(OSError, EOFError, LookupError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_USUAL = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def find_in_table(config: DataConfig, captioner: Captioner) -> tuple[list[Example], str]:
    """The captioned images of dataset_name, and the rule by which they were found.

    Raises:
        DataError: It cannot be loaded, or a column cannot be found.
    """
    name = config.dataset_name or ""
    table = load_table(config, captioner.remarks)
    shown = f"{Path(name).name}[{config.dataset_split}]"
    image_column, caption_column = _choose_columns(table, config, shown, captioner.remarks)
    pictures = _open_image_column(table, image_column, Path(name).expanduser())

    # Both columns side by side, in batches: no picture is read for this, and no column held as a whole.
    rows = zip(pictures.problems(), _cells(table, caption_column), strict=True)
    examples = []
    for row, (problem, caption) in enumerate(rows):
        source = f"{shown} row {row}"
        if problem and problem.kind == "refused":
            captioner.remarks.add(problem.of(source))
            continue
        if problem:
            captioner.remarks.tally(source, problem.problem, problem.action)
        if caption_column is None:
            captions = captioner.missing(source, "no caption", "set caption_column")
        else:
            captions = captioner.caption(source, caption, "give the row a caption")
        if captions:
            examples.append(Example(source, partial(pictures.read, row), captions, config.num_repeats[0]))

    origin = f"column {caption_column}" if caption_column else "instance_prompt"
    if caption_column and captioner.instance_prompt:
        origin += ", else instance_prompt"
    return examples, f"images of {shown}, column {image_column}; captions from {origin}"


def _choose_columns(
    table: "Dataset", config: DataConfig, shown: str, remarks: Remarks
) -> tuple[str, str | None]:
    from datasets import Image

    typed = [column for column, feature in table.features.items() if isinstance(feature, Image)]
    first = {}
    for column in table.column_names:
        first[column] = _first_value(next(_batches(table, column)), column)
    image = choose_image_column(config.image_column, first, typed, shown)
    if image is None:
        refuse_columns("image_column", "no column of images", first, shown)
    for column in typed:
        if column != image:
            remarks.notice(f"{shown} {column}", "another column of images", f"not used; {image} is learned")

    others = {column: value for column, value in first.items() if column != image and column not in typed}
    caption = choose_caption_column(config.caption_column, others, shown)
    if caption is None and config.instance_prompt is None:
        refuse_columns("caption_column", "no column of captions", others, shown)
    return image, caption


def _first_value(cells: "ChunkedArray", column: str) -> Any:
    """A value that shows the user what a column holds; None where its first rows are empty."""
    for start in range(len(cells)):
        value = _values(cells[start : start + 1], column)[0]
        if value not in (None, ""):
            return value
    return None


def _cells(table: "Dataset", column: str | None) -> Iterator[Any]:
    """The values of a column, one for each row; nothing but None where there is no column."""
    if column is None:
        return iter([None] * len(table))
    return (cell for batch in _batches(table, column) for cell in _values(batch, column))


def _values(cells: Any, column: str) -> list[Any]:
    try:
        return cells.to_pylist()
    except (ValueError, ArithmeticError) as error:  # text that is not UTF-8, dates beyond all
        raise DataError(f"column {column} cannot be read ({error}); write the table anew as UTF-8") from error


def _batches(table: "Dataset", column: str) -> Iterator["ChunkedArray"]:
    return (batch.column(column) for batch in _undecoded(table, column).iter(batch_size=_BATCH_ROWS))


def _undecoded(table: "Dataset", column: str) -> Any:
    """A column as it is stored: datasets would decode images, and fetch those that are addresses."""
    return table.select_columns([column]).with_format("arrow")


@dataclass(frozen=True)
class ImageColumn:
    """A column of images: encoded bytes, or names of files."""

    table: Any
    """A dataset of this column alone, undecoded."""
    column: str
    folder: Path | None
    """Where relative names lead to; None for datasets of the Hub."""
    roots: tuple[Path, ...]
    """Where files may lie, without links."""
    meant: dict[str, str] = field(default_factory=dict)
    """Files by names that lead to none as they stand there; filled by ``problems``."""

    def problems(self) -> Iterator[Finding | None]:
        """Why each row has no image that can be read, if so, or how it was found. No image is read for that.

        Raises:
            DataError: The column holds something else.
        """
        for cells in _batches(self.table, self.column):
            sizes, names = _sizes_and_names(cells, self.column)
            for size_bytes, name in zip(sizes, names, strict=True):
                yield None if size_bytes else self._name_problem(name)

    def read(self, row: int) -> bytes:
        """The encoded image of a row.

        Raises:
            ImageError: Its file cannot be read any more.
        """
        # A cell of the type Image is a dict; others are bytes, or the name of a file.
        cell = self.table[row].column(self.column)[0].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(content, bytes):
            return content

        # datasets leaves images of zip files packed, under names such as zip://a.png::/data/images.zip.
        name = cell["path"] if isinstance(cell, dict) else cell
        packed = split_member(name)
        if packed:
            member, archive = packed
            return read_member(Path(archive), member)
        path = self._path(name)
        return read_bytes(path, self._root(path) or path.parent)

    def _name_problem(self, name: str | None) -> Finding | None:
        if not name:
            return refused("no image in the row", "remove the row")
        packed = split_member(name)
        if packed:
            name = packed[1]  # the archive must lie inside as well

        # Absolute names are what datasets makes of relative ones, so they are judged by where they lead.
        if not Path(name).is_absolute():
            problem = name_problem(name)
            if problem:
                return problem
            if not self._path(name).exists() and name not in self.meant:
                self._look_for(name)
        root = self._root(self._path(name))
        if root is None:
            action = "set train_data_dir to the images' folder instead"
            return refused(f"file outside of the dataset ({name:.60})", action)
        problem = file_problem(self._path(name), root)
        if problem and not self._path(name).exists():
            return refused(f"{problem.problem[:-1]}: {name:.60})", problem.action)
        if problem is None and name in self.meant and alike(self.meant[name]) != alike(_with_slashes(name)):
            return noticed("file name without its folder", "found in a sub-folder")
        return problem

    def _look_for(self, name: str) -> None:
        """Find the file that is meant, as in tables of folders: one that looks the same, or lies deeper."""
        written = _with_slashes(name)
        files = self._names.find(written) or self._names.find_below(written, "")
        if len(files) == 1:
            self.meant[name] = files[0]

    @cached_property
    def _names(self) -> Names:
        # Only where a name leads to nothing: a dataset may have a million files.
        return Names(list_files(self.folder, "", (), Remarks()) if self.folder else ())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_names"}

    def _path(self, name: str) -> Path:
        return self.folder / self.meant.get(name, name) if self.folder else Path(name)

    def _root(self, path: Path) -> Path | None:
        real = path.resolve()
        for root in self.roots:
            if real.is_relative_to(root):
                return root
        return None


def _with_slashes(name: str) -> str:
    return posixpath.normpath(name.strip().replace("\\", "/"))


def _open_image_column(table: "Dataset", column: str, dataset: Path) -> ImageColumn:
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    # The caches count as inside: there lies what datasets has downloaded and unpacked.
    roots = [Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]
    folder = None
    if dataset.exists():
        folder = dataset if dataset.is_dir() else dataset.parent
        roots.insert(0, trusted_root(folder))
    resolved = tuple(root.expanduser().resolve() for root in roots)
    return ImageColumn(_undecoded(table, column), column, folder, resolved)


def _sizes_and_names(cells: "ChunkedArray", column: str) -> tuple[list[Any], list[Any]]:
    """Size of each encoded image in bytes and name of its file, None where a row has none."""
    from pyarrow import types

    if types.is_struct(cells.type):  # the type Image: {"bytes": binary, "path": string}
        fields = dict(zip([field.name for field in cells.type], cells.flatten(), strict=True))
    elif is_text(cells.type):
        fields = {"path": cells}
    else:
        fields = {"bytes": cells}

    content = fields.get("bytes")
    if content is not None and not is_binary(content.type):
        content = None
    names = fields.get("path")
    if names is not None and not is_text(names.type):
        names = None
    if content is None and names is None:
        raise DataError(f"column {column} holds {cells.type}, not images; set image_column to another column")

    size_list: list[Any] = [None] * len(cells)
    name_list: list[Any] = [None] * len(cells)
    if content is not None:
        size_list = binary_lengths(content)
    if names is not None:
        name_list = names.to_pylist()
    return size_list, name_list


def split_member(name: str) -> tuple[str, str] | None:
    """The name of a packed file and the path of its archive; None where the name is not of this kind."""
    # A second "::" would be an archive within an archive, or a file behind an address.
    member, separator, archive = name.removeprefix(_PREFIX).partition("::")
    return (member, archive) if name.startswith(_PREFIX) and separator and "::" not in archive else None


def read_member(archive: Path, member: str) -> bytes:
    """The content of a packed file; its checksum is checked.

    Raises:
        ImageError: The archive or the file in it is damaged, missing, locked or huge.
    """
    try:
        opened = _open(archive, os.getpid())
        info = opened.getinfo(member)
        # Other methods are rare, and need modules that this Python may lack.
        if info.compress_type not in _USUAL:
            raise ImageError("packed in an unusual way", f"pack {archive.name} anew as a plain zip file")
        if info.file_size > MAX_BYTES:  # no more than it says is unpacked
            raise ImageError(f"larger than {MAX_BYTES // 2**20} MiB", "replace or remove it")
        return opened.read(member)
    except _FAILURES as error:
        raise ImageError(f"cannot be unpacked ({error})", f"fetch {archive.name} anew") from error


@lru_cache(maxsize=8)
def _open(archive: Path, process: int) -> zipfile.ZipFile:
    """Kept open, because a table of contents is long.

    The process is part of the key: forked processes share a file's position, and would read each other's
    bytes.
    """
    return zipfile.ZipFile(archive)
