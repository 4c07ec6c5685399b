"""What lies in a folder of images: pictures, captions, metadata files; and which paths lead out of it.

Folders of runs, hidden files and folders (.ipynb_checkpoints, macOS' ._x.jpg) and __MACOSX are passed over,
links to folders are not followed. Names are relative to the folder, with slashes, in the order of letters.

Data may come from strangers: a link or a row must not lead to files that whoever runs this has not shown us.
"""

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_utils.data.findings import Finding, Remarks, refused, showable
from lora_utils.data.formats import SUFFIXES, UNREADABLE_SUFFIXES, named
from lora_utils.data.sources.names import Names, alike
from lora_utils.data.sources.own_output import describe_output

CAPTION_ENDINGS = (".txt", ".caption", ".cap", ".tags")
"""Of caption files, the usual one first; sd-scripts and taggers write the others."""
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class FileTree:
    """The files of a folder and its sub-folders, by what they are."""

    root: Path
    prefix: str
    """Stands before names in remarks, so that equal names in several folders can be told apart."""
    endings: tuple[str, ...]
    """Those of caption files, such as '.txt'; the first is the usual one."""
    images: list[str] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)
    """Images that were refused."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Caption files by what their names without ending look like."""
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    """Tables by other names, which may be about anything."""
    strays: list[str] = field(default_factory=list)
    """All other files."""

    def texts_of(self, image: str) -> list[str]:
        """The caption files of an image: a.txt before a.caption, and a.png.txt before a.txt."""
        stem = os.path.splitext(image)[0]
        texts = self.texts.get(alike(image), []) + self.texts.get(alike(stem), [])

        def rank(text: str) -> tuple[int, bool, bool]:
            ending = caption_ending(text, self.endings)
            name = text[: -len(ending)]
            # Of é.txt in both forms each image has its own, and of a.TXT and a.txt the small letters win.
            return self.endings.index(ending), name not in (image, stem), not text.endswith(ending)

        return sorted(texts, key=rank)


def scan_folder(
    root: Path, prefix: str, text_extension: str | None, skipped: Collection[Path], remarks: Remarks
) -> FileTree:
    """Look through a folder without opening any file; remark on what cannot be used.

    Args:
        root: The folder.
        prefix: Stands before names in remarks.
        text_extension: The ending of caption files, such as '.txt'; the usual ones when not given.
        skipped: Resolved folders that are left out, such as that of the masks.
        remarks: Takes up what cannot be used.
    """
    endings = (text_extension.lower(),) if text_extension else CAPTION_ENDINGS
    tree = FileTree(root, prefix, endings)
    real_root = trusted_root(root)
    # Sorted, as the order of a disk's folders differs from machine to machine, and training follows this one.
    for name in sorted(list_files(root, prefix, skipped, remarks)):
        ending = PurePosixPath(name).suffix.lower()
        if PurePosixPath(name).name.lower() in METADATA:
            tree.metadata.append(name)
        elif caption := caption_ending(name, endings):
            tree.texts.setdefault(alike(name[: -len(caption)]), []).append(name)
        elif ending in SUFFIXES or ending in UNREADABLE_SUFFIXES:
            _take_image(tree, name, ending, real_root, remarks)
        elif ending in TABLE_ENDINGS:
            tree.tables.append(name)
        else:
            tree.strays.append(name)

    for names in Names(tree.images).twins():
        for name in names[1:]:
            problem = f"name that looks like another ({name!a} like {names[0]!a})"
            remarks.notice(prefix + name, problem, "both are used; rename one of them")
    return tree


def caption_ending(name: str, endings: Iterable[str]) -> str:
    """Which of the endings a file has, in whatever letters; empty when it has none of them."""
    return next((ending for ending in endings if name.lower().endswith(ending)), "")


def _take_image(tree: FileTree, name: str, ending: str, real_root: Path, remarks: Remarks) -> None:
    if ending not in SUFFIXES:
        # By name: who has a thousand camera raws would wonder why none of them is learned.
        problem = f"kind of picture that cannot be read ({named(ending)})"
        remarks.refuse(tree.prefix + name, problem, "save it as PNG or JPEG")
        tree.unusable.add(name)
    elif finding := file_problem(tree.root / name, real_root):
        remarks.add(finding.of(tree.prefix + name))
        tree.unusable.add(name)
    else:
        tree.images.append(name)


def list_files(root: Path, prefix: str, skipped: Collection[Path], remarks: Remarks) -> Iterator[str]:
    """Names of the files below a folder, unsorted.

    Args:
        root: The folder.
        prefix: Stands before names in remarks.
        skipped: Resolved folders that are left out.
        remarks: Takes up folders that are not entered and names that cannot be shown.
    """

    def refuse_folder(error: OSError) -> None:
        problem = f"folder that cannot be opened ({error.strerror})"
        remarks.refuse(str(error.filename), problem, "allow reading it")

    for folder, folders, files in os.walk(root, onerror=refuse_folder):
        base = ""
        if Path(folder) != root:
            base = Path(folder).relative_to(root).as_posix() + "/"

        # Pictures that an earlier run has drawn would be learned as if they were the user's own.
        output = describe_output(Path(folder), [*folders, *files]) if base else ""
        if output:
            remarks.tally(prefix + base[:-1], f"{output} (written by this program)", "left out")
            folders.clear()
            continue

        # In place: os.walk enters what this list holds afterwards.
        entered = []
        for name in sorted(folders):
            if _enters(Path(folder, name), prefix + base + name, skipped, remarks):
                entered.append(name)
        folders[:] = entered

        for name in sorted(files):
            if name.startswith("."):
                continue
            # It could not be stored either: neither JSON nor a cache's index holds a lone surrogate.
            if showable(name) == name:
                yield base + name
            else:
                remarks.refuse(prefix + base + name, "file name that cannot be shown", "rename it")


def _enters(folder: Path, shown: str, skipped: Collection[Path], remarks: Remarks) -> bool:
    if folder.name.startswith(".") or folder.name == "__MACOSX":
        return False
    if showable(folder.name) != folder.name:
        remarks.refuse(shown, "folder name that cannot be shown", "rename it")
        return False
    # It may lead out of the folder, or in a circle.
    if folder.is_symlink():
        remarks.refuse(shown, "link to a folder", "not followed; add the folder itself to train_data_dir")
        return False
    if folder.resolve() in skipped:
        return False
    # kohya's "10_dog" means ten repeats there; a user who comes from it would expect them here.
    if re.match(r"\d+_", folder.name):
        remarks.notice(
            shown, "folder name with repeats", "only num_repeats decides how often images are shown"
        )
    return True


def file_problem(path: Path, real_root: Path) -> Finding | None:
    """Why a file may not be read: it is missing, no regular file, or a link out of its folder.

    Args:
        path: The file.
        real_root: From ``trusted_root``.
    """
    # lstat costs one call; resolving, which costs one for each folder above, is left to the rare links.
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        return refused(f"file that cannot be opened ({error.strerror})", "put it there, or leave it out")
    if not stat.S_ISLNK(mode):
        if stat.S_ISREG(mode):
            return None
        # Opening a pipe waits for a writer, for ever.
        return refused("not a regular file", "remove it, or put a plain file there")

    if not path.resolve().is_file():
        return refused("link that leads to no file", "put the file itself there")
    if not path.resolve().is_relative_to(real_root):
        return refused("link out of the folder", "put the file itself there")
    return None


def trusted_root(folder: Path) -> Path:
    """The folder that links of a folder may lead into: itself, or all of a repository in the Hub's cache."""
    real = folder.resolve()
    for parent in real.parents:
        if parent.name == "snapshots":
            # huggingface_hub keeps contents in blobs/ and fills snapshots/ with links to them.
            repository = parent.parent
            return repository if (repository / "blobs").is_dir() else real
    return real


def name_problem(name: str) -> Finding | None:
    """Why text from a table may not be taken for the name of a file in the folder."""
    # Nothing is downloaded: training must not depend on a server, nor tell it who trains. //host is one, too.
    if re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]+:/", name) or name.startswith(("//", "\\\\")):
        return refused(f"address instead of a file ({name:.60})", "download it, then name the file")
    if name.startswith(("/", "\\", "~/")) or re.match(r"[A-Za-z]:[/\\]", name):
        return refused(f"absolute path ({name:.60})", "name the file relative to the folder")
    if "\0" in name:
        return refused("file name with NUL", "correct it")
    # Windows' separators as well, since tables are written there and read here.
    if ".." in re.split(r"[/\\]", name):
        return refused(
            f"path out of the folder ({name:.60})", "name the file relative to the folder, without .."
        )
    return None
