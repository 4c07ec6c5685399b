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
from lora_utils.data.sources.own_output import refuse_output
from lora_utils.system.locations import looked_for


class Masks:
    """The masks of mask_data_dir, found by the image's name relative to its folder; the ending may differ."""

    def __init__(self, folder: Path, remarks: Remarks) -> None:
        """Look through the folder.

        Raises:
            DataError: It is missing or holds no mask.
        """
        if not folder.is_dir():
            raise DataError(
                f"there is no folder {looked_for(folder)}; set mask_data_dir to the folder of your masks"
            )
        self._root = folder
        self._remarks = remarks
        self._used: set[str] = set()
        self._names = scan_folder(folder, f"{folder.name}/", ".txt", (), remarks).images
        if not self._names:
            raise DataError(f"no image in {folder}; put masks there that are named like the images")
        # By stem, as photos are JPEG and their masks PNG.
        self._by_stem: dict[str, list[str]] = {}
        for name in self._names:
            self._by_stem.setdefault(os.path.splitext(name)[0], []).append(name)

    def find(self, image: str, source: str) -> Callable[[], bytes] | None:
        """What reads the image's mask; None when there is none.

        Args:
            image: Name relative to its folder.
            source: What the user knows the image by, for remarks.
        """
        names = self._by_stem.get(os.path.splitext(image)[0], [])
        if not names:
            self._remarks.notice(source, "no mask", "all of it is learned")
            return None
        # Where a.jpg and a.png both exist, here and there, each has the mask of its own ending.
        if image in names:
            name = image
        else:
            name = names[0]
            if len(names) > 1:
                self._remarks.notice(source, "several masks", f"{name} is used")
        self._used.add(name)
        return partial(read_bytes, self._root / name, trusted_root(self._root))

    def check(self) -> None:
        """Remark on masks without image.

        Raises:
            DataError: No mask belongs to any image.
        """
        # One mask too few may be meant; none that fits is a naming scheme that we do not know.
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
    masks = None
    apart = {folder.resolve() for folder in folders}
    if config.mask_data_dir:
        # Masks often lie in a sub-folder of the images, and are no images to learn.
        mask_folder = config.mask_data_dir.expanduser()
        masks = Masks(mask_folder, remarks)
        apart.add(mask_folder.resolve())

    prefixes = _prefixes(list(folders))
    examples: list[Example] = []
    origins: list[str] = []
    for folder, repeats in folders.items():
        prefix = prefixes[folder]
        tree = scan_folder(folder, prefix, config.caption_extension, apart - {folder.resolve()}, remarks)
        metadata = Metadata(tree, config, remarks)
        root = trusted_root(folder)
        origins += metadata.origins
        for image in tree.images:
            captions = _captions(image, tree, root, metadata, captioner)
            if not captions:
                continue  # refused, with a remark
            read_mask = masks.find(image, prefix + image) if masks else None
            # partial, not lambda: it can be pickled and so be called in another process.
            read = partial(read_bytes, folder / image, root)
            examples.append(Example(prefix + image, read, captions, repeats, read_mask))
        _remark_on_texts(tree, metadata, remarks)

    # Without examples no mask can have been used, and the error about that would hide why there are none.
    if masks and examples:
        masks.check()
    origins.append(f"{config.caption_extension} files beside the images")
    if captioner.instance_prompt:
        origins.append("instance_prompt")
    return examples, f"images of {', '.join(map(str, folders))}; captions from {', else '.join(origins)}"


def _different_folders(config: DataConfig, remarks: Remarks) -> dict[Path, int]:
    """Every folder once, with its repeats; an image that is read twice would be shown twice as often."""
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
                f"there is no folder {looked_for(folder)}; "
                "set train_data_dir to the folder that holds your images"
            )
        refuse_output(folder, "train_data_dir")
        if masks == folder.resolve():
            raise DataError(
                f"mask_data_dir and train_data_dir are both {folder}; keep masks in a folder of their own"
            )
        # Resolved: x, x/ and x/sub/.. are one folder.
        if folder.resolve() in seen:
            remarks.notice(
                str(folder), "folder that is given twice", "used once; num_repeats shows it more often"
            )
        else:
            different[folder] = count
        seen.add(folder.resolve())

    # Only a notice: repeats of a sub-folder are how some images are shown more often than others.
    for folder in different:
        if seen.intersection(folder.resolve().parents):
            remarks.notice(
                str(folder), "folder inside another one", "its images count once, with its num_repeats"
            )
    return different


def _prefixes(folders: list[Path]) -> dict[Path, str]:
    """What stands before names in remarks: nothing for a lone folder, else its name, or path if shared."""
    if len(folders) == 1:
        return {folders[0]: ""}
    counts = Counter(folder.name for folder in folders)
    return {folder: f"{folder.name if counts[folder.name] == 1 else folder}/" for folder in folders}


def _captions(
    image: str, tree: FileTree, root: Path, metadata: Metadata, captioner: Captioner
) -> tuple[str, ...]:
    """The image's captions; empty when it was refused."""
    source = tree.prefix + image
    stem = os.path.splitext(image)[0]
    rows = metadata.rows.get(image)
    if rows:
        return metadata.captions(rows, captioner)

    text = tree.texts.get(stem)
    if text:
        # Checked here and not by scan_folder: texts that belong to no image are never opened.
        problem = file_problem(tree.root / text, root)
        if problem:
            captioner.remarks.add(problem.of(tree.prefix + text))
            return ()
        return captioner.read(tree.root / text, tree.prefix + text)

    # Where there is metadata, a row is what its owner forgot; the text file is the second choice.
    cure = f"write what it shows into {PurePosixPath(stem).name}{tree.text_extension}"
    file = metadata.file_of(image)
    if file:
        return captioner.missing(source, f"no row in {file}", f"add one, or {cure}")
    return captioner.missing(source, "no caption", cure)


def _remark_on_texts(tree: FileTree, metadata: Metadata, remarks: Remarks) -> None:
    """Remark on caption files that no image uses, or more than one."""
    by_stem: dict[str, list[str]] = {}
    # Refused images count too: their captions are in order, and need no second remark.
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
