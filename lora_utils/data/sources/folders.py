"""Folders of images with captions: beside them in text files, or in metadata files.

A row of a metadata file comes before a text file, and a text file before instance_prompt.
"""

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import Captioner
from lora_utils.data.examples import DataError, Example
from lora_utils.data.findings import Remarks
from lora_utils.data.images import read_bytes
from lora_utils.data.sources.file_tree import FileTree, file_problem, scan_folder, trusted_root
from lora_utils.data.sources.metadata import Metadata


class Masks:
    """The masks of mask_data_dir, found by the image's name relative to its folder; the ending may differ."""

    def __init__(self, folder: Path, remarks: Remarks) -> None:
        """Look through the folder.

        Raises:
            DataError: It is missing or holds no mask.
        """
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; set mask_data_dir to the folder of your masks")
        self._root = folder
        self._remarks = remarks
        self._used: set[str] = set()
        self._names = scan_folder(folder, f"{folder.name}/", ".txt", (), remarks).images
        if not self._names:
            raise DataError(f"no image in {folder}; put masks there that are named like the images")
        self._by_stem: dict[str, list[str]] = {}
        for name in self._names:
            self._by_stem.setdefault(os.path.splitext(name)[0], []).append(name)

    def find(self, image: str, source: str) -> Callable[[], bytes] | None:
        """Reads the image's mask; None when there is none."""
        names = self._by_stem.get(os.path.splitext(image)[0], [])
        if not names:
            self._remarks.notice(source, "no mask", "all of it is learned")
            return None
        name = image if image in names else names[0]
        if image not in names and len(names) > 1:
            self._remarks.notice(source, "several masks", f"{name} is used")
        self._used.add(name)
        return partial(read_bytes, self._root / name, trusted_root(self._root))

    def check(self) -> None:
        """Remark on masks without image.

        Raises:
            DataError: No mask belongs to any image.
        """
        if not self._used:
            raise DataError(
                f"no mask in {self._root} is named like an image; give {self._names[0]} and the others the "
                "names of their images, in the same sub-folders"
            )
        for name in self._names:
            if name not in self._used:
                self._remarks.tally(f"{self._root.name}/{name}", "mask without image", "not used")


def find_in_folders(config: DataConfig, captioner: Captioner) -> tuple[list[Example], str]:
    """The captioned images of train_data_dir, and the rule by which they were found.

    Raises:
        DataError: A folder or a metadata file cannot be used.
    """
    remarks = captioner.remarks
    folders = _different_folders(config, remarks)
    mask_folder = config.mask_data_dir.expanduser() if config.mask_data_dir else None
    masks = Masks(mask_folder, remarks) if mask_folder else None
    # A folder inside another one is looked through once, with its own repeats; masks are no images.
    apart = {folder.resolve() for folder in [*folders, *([mask_folder] if mask_folder else [])]}
    names = Counter(folder.name for folder in folders)
    examples: list[Example] = []
    origins: list[str] = []
    for folder, repeats in folders.items():
        prefix = f"{folder.name if names[folder.name] == 1 else folder}/" if len(folders) > 1 else ""
        tree = scan_folder(folder, prefix, config.caption_extension, apart - {folder.resolve()}, remarks)
        metadata = Metadata(tree, config, remarks)
        root = trusted_root(folder)
        origins += metadata.origins
        for image in tree.images:
            if captions := _captions(image, tree, root, metadata, captioner):
                read_mask = masks.find(image, prefix + image) if masks else None
                read = partial(read_bytes, folder / image, root)
                examples.append(Example(prefix + image, read, captions, repeats, read_mask))
        _remark_on_texts(tree, metadata, remarks)
    if masks and examples:
        # Only once all images are known: a mask without image is a typing error.
        masks.check()
    origins += [f"{config.caption_extension} files beside the images"]
    origins += ["instance_prompt"] if captioner.instance_prompt else []
    return examples, f"images of {', '.join(map(str, folders))}; captions from {', else '.join(origins)}"


def _different_folders(config: DataConfig, remarks: Remarks) -> dict[Path, int]:
    """Every folder once, with its repeats."""
    given = [folder.expanduser() for folder in config.train_data_dir or []]
    repeats = config.num_repeats if len(config.num_repeats) > 1 else config.num_repeats * len(given)
    masks = config.mask_data_dir and config.mask_data_dir.expanduser().resolve()
    different: dict[Path, int] = {}
    seen: set[Path] = set()
    for folder, count in zip(given, repeats, strict=True):
        if folder.is_file():
            raise DataError(
                f"{folder} is a file; unpack it if it is an archive, and set train_data_dir to the folder"
            )
        if not folder.is_dir():
            raise DataError(
                f"there is no folder {folder}; set train_data_dir to the folder that holds your images"
            )
        if masks == folder.resolve():
            raise DataError(
                f"mask_data_dir and train_data_dir are both {folder}; keep masks in a folder of their own"
            )
        if folder.resolve() in seen:
            remarks.notice(
                str(folder), "folder that is given twice", "used once; num_repeats shows it more often"
            )
        else:
            different[folder] = count
        seen.add(folder.resolve())
    for folder in different:
        if seen.intersection(folder.resolve().parents):
            remarks.notice(
                str(folder), "folder inside another one", "its images count once, with its num_repeats"
            )
    return different


def _captions(
    image: str, tree: FileTree, root: Path, metadata: Metadata, captioner: Captioner
) -> tuple[str, ...]:
    """The image's captions; empty when it was refused."""
    source = tree.prefix + image
    stem = os.path.splitext(image)[0]
    # A row was written for this image; a text file may be left over from another tool.
    if rows := metadata.rows.get(image):
        return metadata.captions(rows, captioner)
    if text := tree.texts.get(stem):
        if problem := file_problem(tree.root / text, root):
            captioner.remarks.add(problem.of(tree.prefix + text))
            return ()
        return captioner.read(tree.root / text, tree.prefix + text)
    cure = f"write what it shows into {PurePosixPath(stem).name}{tree.text_extension}"
    if file := metadata.file_of(image):
        return captioner.missing(source, f"no row in {file}", f"add one, or {cure}")
    return captioner.missing(source, "no caption", cure)


def _remark_on_texts(tree: FileTree, metadata: Metadata, remarks: Remarks) -> None:
    by_stem: dict[str, list[str]] = {}
    for image in [*tree.images, *tree.unusable]:
        by_stem.setdefault(os.path.splitext(image)[0], []).append(image)
    for stem, text in tree.texts.items():
        images = by_stem.get(stem, [])
        if not images:
            remarks.notice(tree.prefix + text, "caption without image", "not used; name it like its image")
        elif all(image in metadata.rows for image in images):
            remarks.tally(tree.prefix + text, "caption file besides a row of metadata", "the row is used")
        elif len(images) > 1:
            names = ", ".join(PurePosixPath(image).name for image in images)
            problem = f"images that share a caption file ({names})"
            remarks.notice(tree.prefix + text, problem, "each of them has this caption")
