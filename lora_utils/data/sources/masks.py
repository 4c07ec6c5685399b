"""Masks: in a folder of their own, or beside their images with a mark in their names."""

import os
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from lora_utils.data.examples import DataError
from lora_utils.data.findings import Remarks
from lora_utils.data.images import read_bytes
from lora_utils.data.sources.file_tree import FileTree, scan_folder, trusted_root
from lora_utils.data.sources.names import alike
from lora_utils.system.locations import looked_for

# -masklabel and -condlabel are OneTrainer's.
_MARK = re.compile(r"(.+)[-_. ](?:mask|masklabel|condlabel)", re.IGNORECASE)
_CONDITION = re.compile(r"(^|/)_controls/|-condlabel\.", re.IGNORECASE)
"""Pictures that belong to images as masks do, and say nothing about the loss."""
_MASK_FOLDERS = {"mask", "masks", "_masks", "_controls"}
_IMAGE_FOLDERS = ("", "image", "images", "img", "imgs")


class Masks:
    """The masks of a folder, found by the image's name relative to its folder; the ending may differ."""

    def __init__(self, folder: Path, names: Sequence[tuple[str, str]], remarks: Remarks) -> None:
        """Take them up.

        Args:
            folder: Where they lie.
            names: The masks, each with the name of an image that it may be made for, without ending.
            remarks: Takes up images without mask, and masks without image.
        """
        self._root = folder
        self._names = list(dict.fromkeys(name for name, _ in names))
        self._remarks = remarks
        self._used: set[str] = set()
        # By stem, as photos are JPEG and their masks PNG.
        self._by_stem: dict[str, list[str]] = {}
        for name, stem in names:
            self._by_stem.setdefault(alike(stem), []).append(name)

    def find(self, image: str, source: str) -> Callable[[], bytes] | None:
        """What reads the image's mask; None when there is none.

        Args:
            image: Name relative to its folder.
            source: What the user knows the image by, for remarks.
        """
        stem = os.path.splitext(image)[0]
        # Before one with a mark; and of é in both forms each has the mask of its own.
        names = sorted(self._by_stem.get(alike(stem), []), key=lambda name: os.path.splitext(name)[0] != stem)
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


def open_masks(folder: Path, remarks: Remarks) -> Masks:
    """The masks of a folder that holds nothing else.

    Raises:
        DataError: It is missing or holds no mask.
    """
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {looked_for(folder)}; set mask_data_dir to the folder of your masks"
        )
    images = scan_folder(folder, f"{folder.name}/", None, (), remarks).images
    if not images:
        raise DataError(f"no image in {folder}; put masks there that are named like the images")
    # a_mask.png may be the mask of a.png, and of a picture that is called a_mask.png just as well.
    stems = [(name, os.path.splitext(name)[0]) for name in images]
    marked = [(name, _without_mark(stem)) for name, stem in stems]
    return Masks(folder, [*stems, *((name, stem) for name, stem in marked if stem)], remarks)


def open_masks_among(folder: Path, remarks: Remarks) -> Masks:
    """The masks that lie beside their images, told from them by their names.

    Raises:
        DataError: There is none.
    """
    # What is wrong in the folder is said when its images are looked for.
    beside = masks_beside(scan_folder(folder, "", None, (), Remarks()))
    names = [(name, stem) for name, stem in beside.items() if not _CONDITION.search(name)]
    if not names:
        raise DataError(
            f"mask_data_dir and train_data_dir are both {folder}; keep masks in a folder of their own, or "
            "name them after their images, such as a_mask.png"
        )
    return Masks(folder, names, remarks)


def masks_beside(tree: FileTree) -> dict[str, str]:
    """The pictures of a tree that are masks of others, with the name of their image without ending."""
    stems = {alike(os.path.splitext(image)[0]) for image in tree.images}
    owners = {image: _owner(os.path.splitext(image)[0], stems) for image in tree.images}
    return {image: owner for image, owner in owners.items() if owner}


def _owner(stem: str, stems: Collection[str]) -> str | None:
    """The image that a picture is the mask of, by their names; None for most pictures.

    Args:
        stem: The picture's name relative to its folder, without ending.
        stems: Those of all images, as ``alike`` gives them.
    """
    bare = _without_mark(stem)
    if bare and alike(bare) in stems:
        return alike(bare)
    folder, _, name = (bare or stem).rpartition("/")
    parent, _, last = folder.rpartition("/")
    if last.lower() not in _MASK_FOLDERS:
        return None
    for sibling in _IMAGE_FOLDERS:
        owner = alike("/".join(part for part in (parent, sibling, name) if part))
        if owner in stems:
            return owner
    return None


def _without_mark(stem: str) -> str | None:
    """The name that a mask's name was made of, such as a for a_mask; None for other names."""
    match = _MARK.fullmatch(stem)
    return match[1] if match else None
