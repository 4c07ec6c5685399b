"""A folder of compared pictures: tried before anything is drawn, and never a mixture of two comparisons.

An earlier comparison moves as a whole into ``earlier-1`` (or -2, -3) in its folder when the first new picture
is there. Where the new one repeats every picture of it, byte by byte, the copy goes. Whatever no comparison
has written stays untouched.
"""

import itertools
import logging
import re
import shutil
from contextlib import suppress
from pathlib import Path

from lora_utils import UserError
from lora_utils.compare.png import was_drawn_here
from lora_utils.config.section import Size
from lora_utils.storage.log import CONFIG, PICTURES
from lora_utils.system.files import nearest_existing, remove, staged, write_new
from lora_utils.system.locations import why_unwritable
from lora_utils.system.portable import rename

LOGGER = logging.getLogger(__name__)
BASELINE = "baseline"
FINETUNED = "finetuned"
SHEET = "sheet.png"
PICTURE_NAME = re.compile(rf"({BASELINE}|{FINETUNED})_\d+_seed-?\d+\.png")
PROBE_BYTES = 4096
ELSEWHERE = "set infer_path to another folder"


class AlbumError(UserError):
    """Pictures cannot be written into a folder."""


def require_writable(folder: Path, pictures: int, size: Size) -> None:
    """Try to write into a folder, before minutes are spent on what to write; leaves no trace.

    Args:
        folder: Need not exist.
        pictures: How many there will be.
        size: Of each, in pixels.

    Raises:
        AlbumError: It cannot be written, has too little room, or files of something else are in the way.
    """
    if problem := why_unwritable(folder):
        raise AlbumError(f"pictures cannot be written into {folder}: {problem}; {ELSEWHERE}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staged(folder / "probe") as partial:
            write_new(partial, bytes(PROBE_BYTES))
    except OSError as error:
        reason = error.strerror
        raise AlbumError(f"pictures cannot be written into {folder}: {reason}; {ELSEWHERE}") from error
    finally:
        for path in made:
            with suppress(OSError):  # not there, or somebody else's by now
                path.rmdir()

    # A PNG of a photograph has one to two bytes for each pixel.
    needed = pictures * size[0] * size[1]
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < needed:
        raise AlbumError(
            f"{pictures} pictures take some {needed / 2**20:,.0f} MiB, and there are {free / 2**20:,.0f} MiB "
            f"left for {folder}; free some, or {ELSEWHERE}"
        )
    _require_unclaimed(folder)


def set_aside(folder: Path) -> Path | None:
    """Move the comparison that a folder holds into ``earlier-N`` in it, and tell; None if it holds none."""
    pictures = _pictures_in(folder)
    if not pictures:
        return None
    candidates = (folder / f"earlier-{number}" for number in itertools.count(1))
    aside = next(path for path in candidates if not path.exists())
    aside.mkdir()
    # Pictures last: by them a folder is known as a comparison's, should this process be killed on the way.
    for path in [folder / SHEET, folder / CONFIG, *pictures]:
        if path.is_file():
            rename(path, aside / path.name)
    LOGGER.warning("the earlier comparison in %s is in %s now", folder, aside)
    return aside


def drop_if_repeated(earlier: Path) -> None:
    """Delete a comparison that was set aside, if all of its files are in the folder again, byte by byte.

    Its sheet may be another: of one that was interrupted it shows fewer pictures.
    """
    for old in earlier.iterdir():
        new = earlier.parent / old.name
        is_sheet = old.name == SHEET and was_drawn_here(old)
        if not is_sheet and not (new.is_file() and new.read_bytes() == old.read_bytes()):
            return
    remove(earlier)
    LOGGER.warning("the earlier pictures are all among the new ones, and %s is gone again", earlier)


def _require_unclaimed(folder: Path) -> None:
    """Refuse a folder where the names that a comparison needs are taken by something else."""
    if not folder.is_dir():
        return
    # A config.yaml beside weights says how they were made.
    if any(folder.glob("*.safetensors")):
        raise AlbumError(f"{folder} holds a LoRA; {ELSEWHERE}, such as {folder / PICTURES}")
    if _pictures_in(folder):
        return
    for path in folder.iterdir():
        if path.name in (SHEET, CONFIG) or PICTURE_NAME.fullmatch(path.name):
            raise AlbumError(
                f"{path} is of no comparison, and would be replaced by one; {ELSEWHERE}, such as "
                f"{folder / PICTURES}"
            )


def _pictures_in(folder: Path) -> list[Path]:
    """What has the names of compared pictures, if at least one of them is such a picture."""
    if not folder.is_dir():
        return []
    named = sorted(path for path in folder.iterdir() if PICTURE_NAME.fullmatch(path.name))
    return named if any(map(was_drawn_here, named)) else []
