"""What a message says of a path: where it was looked for, and why nothing could be written there."""

import os
import re
from pathlib import Path

DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def looked_for(path: Path | str) -> str:
    """A path for a message: a relative one with the folder in which it was looked for."""
    return str(path) if os.path.isabs(path) else f"{path} in {Path.cwd()}"


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean something on a disk; owner/name could be on the Hub as well."""
    starts = name.startswith((".", "/", "~")) or DRIVE.match(name) is not None
    return starts or "\\" in name or name.count("/") > 1 or name.endswith("/")


def why_unwritable(folder: Path) -> str | None:
    """Why nothing could be written into a folder, which need not exist; None where it could be."""
    absolute = folder.absolute()
    try:
        os.lstat(absolute)
    except (FileNotFoundError, NotADirectoryError):
        pass  # the nearest that exists decides
    except OSError as error:  # too long for a name, or behind a folder that may not be entered
        return f"{absolute} cannot be reached ({error.strerror})"
    # lexists, and not exists: a link that leads nowhere is in the way as well.
    nearest = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        return f"{nearest} is {'a link to nothing' if not os.path.exists(nearest) else 'a file'}"
    # Asked of the system, not of the file's mode: a disk can be mounted for reading alone.
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"nothing may be written into {nearest}"
