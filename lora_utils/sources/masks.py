"""Masks: grey images that lie in a folder of their own under the names of the images they belong to."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lora_utils.images import read_bytes
from lora_utils.sources.examples import DataError, Remarks
from lora_utils.sources.trees import grow_tree, trusted_root


class Masks:
    """The masks of mask_data_dir, found by the image's name relative to its folder; the ending may differ."""

    def __init__(self, folder: Path, remarks: Remarks) -> None:
        """Look through the folder.

        Raises:
            DataError: It is missing or holds no mask.
        """
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; set mask_data_dir to the folder of your masks")
        self._root, self._remarks, self._used = folder, remarks, set[str]()
        self._names = grow_tree(folder, f"{folder.name}/", ".txt", (), remarks).images
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
                f"no mask in {self._root} is named like an image; give {self._names[0]} and the others the names "
                "of their images, in the same sub-folders"
            )
        for name in self._names:
            if name not in self._used:
                self._remarks.tally(f"{self._root.name}/{name}", "mask without image", "not used")
