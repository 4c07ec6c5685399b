"""Folders of images with captions: beside them in text files, or in metadata files.

A row of a metadata file comes before a text file, and a text file before instance_prompt.
"""

import os
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import Captioner
from lora_utils.data.examples import DataError, Example
from lora_utils.data.findings import Remarks
from lora_utils.data.images import read_bytes
from lora_utils.data.sources.file_tree import (
    CAPTION_ENDINGS,
    FileTree,
    caption_ending,
    file_problem,
    scan_folder,
    trusted_root,
)
from lora_utils.data.sources.masks import masks_beside, open_masks, open_masks_among
from lora_utils.data.sources.metadata import Metadata
from lora_utils.data.sources.own_output import refuse_output
from lora_utils.data.sources.sidecars import remark_on_strays
from lora_utils.system.locations import looked_for


def find_in_folders(config: DataConfig, captioner: Captioner) -> tuple[list[Example], str]:
    """The captioned images of train_data_dir, and the rule by which they were found.

    Raises:
        DataError: A folder or a metadata file cannot be used.
    """
    remarks = captioner.remarks
    folders = _different_folders(config, remarks)
    masks = None
    apart = {folder.resolve() for folder in folders}
    mask_folder = config.mask_data_dir and config.mask_data_dir.resolve()
    if config.mask_data_dir and mask_folder:
        # Masks often lie in a sub-folder of the images, and are no images to learn.
        opened = open_masks_among if mask_folder in apart else open_masks
        masks = opened(config.mask_data_dir, remarks)
        apart.add(mask_folder)

    prefixes = _prefixes(list(folders))
    examples: list[Example] = []
    origins: list[str] = []
    endings: set[str] = set()
    for folder, repeats in folders.items():
        prefix = prefixes[folder]
        tree = scan_folder(folder, prefix, config.caption_extension, apart - {folder.resolve()}, remarks)
        metadata = Metadata(tree, config, remarks)
        pictures = _without_masks(tree, metadata, remarks)
        if folder.resolve() != mask_folder:
            _remark_on_masks(tree, pictures, remarks)
        metadata.add_tables(
            [name for name in pictures if not metadata.rows.get(name) and not tree.texts_of(name)]
        )
        remark_on_strays(tree, remarks)
        root = trusted_root(folder)
        origins += metadata.origins
        for image in pictures:
            captions = _captions(image, tree, root, metadata, captioner)
            if not captions:
                continue  # refused, with a remark
            read_mask = masks.find(image, prefix + image) if masks else None
            # partial, not lambda: it can be pickled and so be called in another process.
            read = partial(read_bytes, folder / image, root)
            examples.append(Example(prefix + image, read, captions, repeats, read_mask))
        endings |= _remark_on_texts(tree, pictures, metadata, remarks)

    # Without examples no mask can have been used, and the error about that would hide why there are none.
    if masks and examples:
        masks.check()
    usual = (config.caption_extension.lower(),) if config.caption_extension else CAPTION_ENDINGS
    used = [ending for ending in usual if ending in endings] or usual[:1]
    origins.append(f"{', else '.join(used)} files beside the images")
    if captioner.instance_prompt:
        origins.append("instance_prompt")
    return examples, f"images of {', '.join(map(str, folders))}; captions from {', else '.join(origins)}"


def _without_masks(tree: FileTree, metadata: Metadata, remarks: Remarks) -> list[str]:
    """The pictures that are learned: all but masks beside their images."""
    beside = masks_beside(tree)
    pictures = []
    for image in tree.images:
        is_captioned = image in metadata.rows or bool(tree.texts_of(image))
        if image in beside and is_captioned:
            remarks.notice(tree.prefix + image, "name like that of a mask", "learned, as it has a caption")
        if image not in beside or is_captioned:
            pictures.append(image)
    return pictures


def _remark_on_masks(tree: FileTree, pictures: list[str], remarks: Remarks) -> None:
    for image in sorted(set(tree.images) - set(pictures)):
        action = "not learned; where the loss shall follow it, set mask_data_dir to this folder"
        remarks.tally(tree.prefix + image, "mask beside its image", action)


def _different_folders(config: DataConfig, remarks: Remarks) -> dict[Path, int]:
    """Every folder once, with its repeats; an image that is read twice would be shown twice as often."""
    given = [folder.expanduser() for folder in config.train_data_dir or []]
    repeats = config.num_repeats if len(config.num_repeats) > 1 else config.num_repeats * len(given)
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

    texts = tree.texts_of(image)
    if texts:
        text = texts[0]
        # Checked here and not by scan_folder: texts that belong to no image are never opened.
        problem = file_problem(tree.root / text, root)
        if problem:
            captioner.remarks.add(problem.of(tree.prefix + text))
            return ()
        return captioner.read(tree.root / text, tree.prefix + text)

    rows = metadata.further.get(image)
    if rows:
        return metadata.captions(rows, captioner)

    # Where there is metadata, a row is what its owner forgot; the text file is the second choice.
    cure = f"write what it shows into {PurePosixPath(stem).name}{tree.endings[0]}"
    file = metadata.file_of(image)
    if file:
        return captioner.missing(source, f"no row in {file}", f"add one, or {cure}")
    return captioner.missing(source, "no caption", cure)


def _users(tree: FileTree, pictures: list[str]) -> dict[str, list[str]]:
    """The images that each caption file is for; of several files of an image only the first."""
    users: dict[str, list[str]] = {}
    # Refused images count too: their captions are in order, and need no second remark.
    for image in [*pictures, *tree.unusable]:
        for text in tree.texts_of(image)[:1]:
            users.setdefault(text, []).append(image)
    return users


def _remark_on_texts(tree: FileTree, pictures: list[str], metadata: Metadata, remarks: Remarks) -> set[str]:
    """Remark on caption files that no image uses, or more than one; the endings of those that are used."""
    users = _users(tree, pictures)
    spare = {text for image in [*pictures, *tree.unusable] for text in tree.texts_of(image)[1:]}
    endings: set[str] = set()
    for text in sorted(text for texts in tree.texts.values() for text in texts):
        images = users.get(text, [])
        ending = caption_ending(text, tree.endings)
        if not images and text in spare:
            action = f"the first of {', '.join(tree.endings)} is used; caption_extension chooses another"
            remarks.tally(tree.prefix + text, f"second caption file of an image ({ending})", action)
        elif not images:
            remarks.notice(tree.prefix + text, "caption without image", "not used; name it like its image")
        elif all(image in metadata.rows for image in images):
            remarks.tally(tree.prefix + text, "caption file besides a row of metadata", "the row is used")
        else:
            endings.add(ending)
            _remark_on_use(tree, text, images, remarks)
    return endings


def _remark_on_use(tree: FileTree, text: str, images: list[str], remarks: Remarks) -> None:
    ending = caption_ending(text, tree.endings)
    if ending != tree.endings[0]:
        problem = f"caption file that is no {tree.endings[0]} ({ending})"
        remarks.tally(tree.prefix + text, problem, "used, as there is no other")
    if len(images) > 1:
        names = ", ".join(PurePosixPath(image).name for image in images)
        problem = f"images that share a caption file ({names})"
        remarks.notice(tree.prefix + text, problem, "each of them has this caption")
