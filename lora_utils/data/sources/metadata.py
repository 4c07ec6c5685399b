"""What metadata files and other tables say about the images of a folder.

A file describes images in its own folder and below. Rows about the same image add up, from whichever file:
equal ones count once, different captions are several captions of the image. metadata.* comes before caption
files; a table by another name, which may be about anything, only says what no caption file does.
"""

import posixpath
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import Captioner
from lora_utils.data.examples import DataError
from lora_utils.data.findings import Remarks
from lora_utils.data.sources.columns import choose_caption_column, choose_image_column, refuse_columns
from lora_utils.data.sources.file_tree import (
    TABLE_ENDINGS,
    FileTree,
    file_problem,
    name_problem,
    trusted_root,
)
from lora_utils.data.sources.names import Names
from lora_utils.data.sources.row_files import read_lines

# Of tables beside a folder of images; there could be any others, about anything.
_USUAL_STEMS = {"metadata", "captions", "caption", "labels", "prompts", "tags", "texts", "dataset", "train"}


@dataclass(frozen=True)
class Row:
    """One line about one image."""

    source: str
    """'metadata.jsonl line 3'; rows of parquet files count from 0, as datasets does."""
    file_name: Any
    """As it stands there; need not be text, nor name an image."""
    caption: Any
    """As it stands there: a text, a list of texts, or anything else that is to be refused."""


def read_rows(
    path: Path, name: str, config: DataConfig, remarks: Remarks, is_needed: bool = True
) -> tuple[list[Row], str]:
    """The rows of a file and the name of its column of captions; bad lines are refused one by one.

    Args:
        path: The file; its ending says how to read it.
        name: What the user knows the file by.
        config: May name the columns.
        remarks: Takes up bad lines.
        is_needed: False where all images have captions without it: then it may be about other things.

    Raises:
        DataError: The file as a whole cannot be used, or a column cannot be found.
    """
    rows = read_lines(path, name, remarks)
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
    if image is None and not is_needed:
        remarks.notice(name, "metadata without a column file_name", "not used; all images have caption files")
        return [], ""
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


class Metadata:
    """The rows of all metadata files of a tree, and of other tables where they are needed, by image."""

    rows: dict[str, list[Row]]
    """By name of the image relative to the tree; those of metadata files."""
    further: dict[str, list[Row]]
    """Those of other tables, for images that have no other caption."""
    origins: list[str]
    """What captions come from, such as 'metadata.jsonl (column text)'."""

    def __init__(self, tree: FileTree, config: DataConfig, remarks: Remarks) -> None:
        """Read the metadata files.

        Args:
            tree: The folder whose metadata files are read.
            config: May name the columns.
            remarks: Takes up rows that lead to no image.

        Raises:
            DataError: One cannot be used, or there are two in one folder.
        """
        self.rows = {}
        self.further = {}
        self.origins = []
        self._tree = tree
        self._config = config
        self._remarks = remarks
        self._names = Names([*tree.images, *tree.unusable])
        self._files: dict[str, str] = {}  # by folder
        for file in tree.metadata:
            folder = posixpath.dirname(file)
            if folder in self._files:
                raise DataError(f"{tree.root} holds both {self._files[folder]} and {file}; keep one of them")
            finding = file_problem(tree.root / file, trusted_root(tree.root))
            if finding:
                raise DataError(f"{tree.prefix + file} cannot be used ({finding.problem}); {finding.action}")

            self._files[folder] = file
            # Who names a column means the table.
            is_needed = bool(config.caption_column) or not all(map(tree.texts_of, tree.images))
            rows, column = read_rows(tree.root / file, tree.prefix + file, config, remarks, is_needed)
            if column:
                self.origins.append(f"{tree.prefix + file} (column {column})")
            self._take(rows, folder, self._names, self.rows, remarks)

    def add_tables(self, images: Collection[str]) -> None:
        """Read tables by other names, where there are images without any caption.

        Args:
            images: Those images.
        """
        tree = self._tree
        for file in tree.tables:
            if images and not file_problem(tree.root / file, trusted_root(tree.root)):
                self._add_table(
                    tree.root / file, tree.prefix + file, posixpath.dirname(file), self._names, images
                )
            else:
                self._remarks.tally(tree.prefix + file, "table besides the captions", "not used")
        if not images or self.further or tree.metadata:
            return

        # captions.csv often lies beside the folder of the images, and that folder is what is named.
        parent = tree.root.resolve().parent
        below = tree.root.resolve().name
        names = Names(f"{below}/{name}" for name in [*tree.images, *tree.unusable])
        for path in sorted(parent.glob("*.*")):
            is_usual = path.stem.lower() in _USUAL_STEMS and path.suffix.lower() in (
                *TABLE_ENDINGS,
                ".parquet",
            )
            if is_usual and not file_problem(path, parent):
                self._add_table(path, f"../{path.name}", "", names, [f"{below}/{image}" for image in images])

    def _add_table(self, path: Path, shown: str, folder: str, names: Names, images: Collection[str]) -> None:
        """Take up a table's rows if they are about the images, and say why if they are not."""
        remarks = Remarks()  # of a table that is about something else, its lines are of no interest
        rows: dict[str, list[Row]] = {}
        try:
            table, column = read_rows(path, shown, self._config, remarks)
        except DataError as error:
            self._remarks.notice(shown, *_passed_over(str(error).removeprefix(shown).strip(), names))
            return
        self._take(table, folder, names, rows, remarks)
        if rows.keys().isdisjoint(images):
            tried = f"its first row would be {_file_of(table[0], folder)}" if table else "it has no rows"
            self._remarks.notice(
                shown, f"table without an image that needs a caption ({tried})", "passed over"
            )
            return

        for finding in remarks.findings():
            self._remarks.add(finding)
        self.origins.append(f"{shown} (column {column})")
        prefix = f"{self._tree.root.resolve().name}/" if shown.startswith("../") else ""
        for image, added in rows.items():
            self.further.setdefault(image.removeprefix(prefix), []).extend(added)

    def _take(
        self, table: list[Row], folder: str, names: Names, rows: dict[str, list[Row]], remarks: Remarks
    ) -> None:
        unusable = {name for unusable in self._tree.unusable for name in names.find(unusable)}
        for row in table:
            image = _find_image(row, folder, names, remarks)
            # Of an image that was refused its own remark says enough.
            if image and image not in unusable:
                rows.setdefault(image, []).append(row)

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


def _passed_over(error: str, images: Names) -> tuple[str, str]:
    """Of a table that cannot be read: what is wrong, and how it would be used."""
    sentence, *listed = error.splitlines()
    reason, _, cure = sentence.partition("; ")
    problem = f"table that is not used ({reason})"
    columns = [column.strip().partition(":")[0] for column in listed]
    if any(images.find(column) or images.find_below(column, "") for column in columns):
        return problem, "passed over; write the line 'file_name,text' above its first to use it"
    # It may be about anything, so nothing is asked; but what there is to choose from is named.
    shown = ", ".join(column[:40] for column in columns[:8])
    return problem, f"passed over; {cure.partition(' to one of')[0]}{shown and f' ({shown})'} to use it"


def _file_of(row: Row, folder: str) -> str:
    return posixpath.normpath(posixpath.join(folder, str(row.file_name).strip().replace("\\", "/")))


def _find_image(row: Row, folder: str, names: Names, remarks: Remarks) -> str:
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
    file = _file_of(row, folder)
    images = names.find(file)
    if not images:
        images = names.find_below(posixpath.relpath(file, folder or "."), folder)
        if len(images) == 1:
            below = posixpath.dirname(images[0]) or "."
            remarks.tally(row.source, "file name without its folder", f"found in {below}")
    if not images:
        problem = f"row without image ({name:.60})"
        remarks.refuse(row.source, problem, f"put the image at {file}, or remove the row")
    elif len(images) > 1:
        problem = f"row that fits several images ({', '.join(images[:3])})"
        remarks.refuse(row.source, problem, "write the folder of the image before its name")
    return images[0] if len(images) == 1 else ""
