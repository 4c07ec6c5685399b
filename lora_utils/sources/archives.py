"""Images inside zip files, which datasets names as zip://folder/a.png::/path/to/images.zip and leaves packed."""

import os
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

from lora_utils.images import MAX_BYTES, ImageError

_PREFIX = "zip://"
_FAILURES = (OSError, EOFError, LookupError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)
_USUAL = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def split_member(name: str) -> tuple[str, str] | None:
    """The name of a packed file and the path of its archive; None where the name is not of this kind."""
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
        if info.compress_type not in _USUAL:
            raise ImageError(f"packed in an unusual way; pack {archive.name} anew as a plain zip file")
        if info.file_size > MAX_BYTES:  # no more than it says is unpacked
            raise ImageError(f"larger than {MAX_BYTES // 2**20} MiB; replace or remove it")
        return opened.read(member)
    except _FAILURES as error:
        raise ImageError(f"cannot be unpacked ({error}); fetch {archive.name} anew") from error


@lru_cache(maxsize=8)
def _open(archive: Path, process: int) -> zipfile.ZipFile:
    """Kept open, because a table of contents is long; not shared between processes, which would share its position."""
    return zipfile.ZipFile(archive)
