"""What metadata files say about the images of a folder.

A file describes images in its own folder and below. Rows about the same image add up, from whichever file: equal
ones count once, different captions are several captions of the image.
"""

import posixpath
from pathlib import PurePosixPath

from lora_utils.data_config import DataConfig
from lora_utils.sources.captions import Captioner
from lora_utils.sources.examples import DataError, Remarks
from lora_utils.sources.rows import Row, read_rows
from lora_utils.sources.trees import Tree, file_problem, name_problem, trusted_root


class Metadata:
    """The rows of all metadata files of a tree, by image."""

    rows: dict[str, list[Row]]
    origins: list[str]
    """What captions come from, such as 'metadata.jsonl (column text)'."""

    def __init__(self, tree: Tree, config: DataConfig, remarks: Remarks) -> None:
        """Read the files.

        Raises:
            DataError: One cannot be used, or there are two in one folder.
        """
        self.rows, self.origins, self._files = {}, [], dict[str, str]()
        images = set(tree.images)
        for file in tree.metadata:
            folder = posixpath.dirname(file)
            if folder in self._files:
                raise DataError(f"{tree.root} holds both {self._files[folder]} and {file}; keep one of them")
            if problem := file_problem(tree.root / file, trusted_root(tree.root)):
                raise DataError(f"{tree.prefix + file} cannot be used ({problem.problem}); {problem.action}")
            self._files[folder] = file
            rows, column = read_rows(tree.root / file, tree.prefix + file, config, remarks)
            self.origins += [f"{tree.prefix + file} (column {column})"] if column else []
            for row in rows:
                image = _find_image(row, folder, remarks)
                if image in images:
                    self.rows.setdefault(image, []).append(row)
                elif image and image not in tree.unusable:
                    problem = f"row without image ({row.file_name:.60})"
                    remarks.refuse(row.source, problem, "put the image there, or remove the row")

    def captions(self, rows: list[Row], captioner: Captioner) -> tuple[str, ...]:
        """The captions in the rows about one image; empty when they were refused."""
        first, seen, captions = rows[0], set[str](), []
        for row in rows:
            if repr(row.caption) in seen:
                captioner.remarks.notice(row.source, f"repeated row ({first.source} is the first)", "used once")
            elif seen:
                problem = f"another row about the same image ({first.source} is the first)"
                captioner.remarks.notice(row.source, problem, "a further caption of it")
            if repr(row.caption) not in seen and row.caption is not None:
                captions += row.caption if isinstance(row.caption, list) else [row.caption]
            seen.add(repr(row.caption))
        return captioner.caption(first.source, captions, "write what the image shows into the row")

    def file_of(self, image: str) -> str | None:
        """The nearest metadata file that should describe an image."""
        above = ["" if folder.name == "" else folder.as_posix() for folder in PurePosixPath(image).parents]
        return next((self._files[folder] for folder in above if folder in self._files), None)


def _find_image(row: Row, folder: str, remarks: Remarks) -> str:
    """The image's name relative to the tree; empty when the row was refused."""
    name = row.file_name
    if not isinstance(name, str) or not name.strip():
        remarks.refuse(row.source, f"row without file name ({name!r:.40})", "write the image's file name into it")
        return ""
    if problem := name_problem(name):
        remarks.refuse(row.source, *problem)
        return ""
    if "\\" in name:
        remarks.fix(row.source, f"backslash in a file name ({name:.60})", "read as slash")
    return posixpath.normpath(posixpath.join(folder, name.strip().replace("\\", "/")))
