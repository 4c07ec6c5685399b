"""Which column of a table holds the images and which the captions: by name, by type, or as the user says.

The first column of a type is no answer: in a table of masks and images it is as often the mask.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NoReturn

from lora_utils.data.examples import DataError
from lora_utils.data.formats import SUFFIXES

# The names that the formats themselves give: imagefolder's tables of files, and datasets' tables of images.
_OWN_NAMES = ("file_name", "image")
# As they occur on the Hub, those of pictures before those of paths, which often lead to where the data was
# made; the endings are what webdataset makes columns of.
_PICTURE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
_PATH_NAMES = ("file_name", "filename", "file", "image_path", "img_path", "image_file", "filepath", "path")
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "prompts", "description", "tags", "sentence", "txt")
# Of these nobody expects that they are learned, as long as there is another column of images.
_SIDE_NAMES = ("mask", "control", "condition", "thumb", "depth", "canny", "pose", "segment", "preview")


def choose_image_column(
    wanted: str | None, examples: Mapping[str, Any], typed: Collection[str], table: str
) -> str | None:
    """The column of images: the wanted one, else by its name, else by its type; None when there is none.

    Args:
        wanted: The setting image_column.
        examples: A value of every column.
        typed: The columns whose type says that they hold images; empty where a format has no types.
        table: What the user knows the table by.

    Raises:
        DataError: The wanted column is not there, or neither name nor type decides among several.
    """
    if wanted is not None:
        return _wanted("image_column", wanted, examples, table)
    names = [*_usual(examples, _PICTURE_NAMES), *_usual(examples, _PATH_NAMES)]
    likely = [name for name in names if name in typed or _may_be_image(examples[name])]
    if not typed:
        return _only("image_column", likely or names, _OWN_NAMES, examples, table)

    named = [name for name in likely if name in typed] or _usual(likely, _PICTURE_NAMES)
    if named:
        return _only("image_column", named, ("image",), examples, table)
    # A path beside a column of images is mostly where those once lay; but a lone mask may be drawn for it.
    is_side = any(word in column.lower() for column in typed for word in _SIDE_NAMES)
    return _only("image_column", [*likely, *typed] if is_side else list(typed), (), examples, table)


def choose_caption_column(wanted: str | None, examples: Mapping[str, Any], table: str) -> str | None:
    """The column of captions: the wanted one, else the only one with a usual name; None when there is none.

    Args:
        wanted: The setting caption_column.
        examples: A value of every column but that of the images.
        table: What the user knows the table by.

    Raises:
        DataError: The wanted column is not there, or several have usual names.
    """
    if wanted is not None:
        return _wanted("caption_column", wanted, examples, table)
    usual = _usual(examples, CAPTION_NAMES)
    # A number beside texts is a label of that name, and no second choice.
    texts = [name for name in usual if isinstance(examples[name], str | list)]
    return _only("caption_column", texts or usual[:1], (), examples, table)


def refuse_columns(setting: str, problem: str, examples: Mapping[str, Any], table: str) -> NoReturn:
    """Raise the error that shows the user what there is to choose from.

    Args:
        setting: image_column or caption_column.
        problem: What the table has, such as 'no column of captions'.
        examples: A value of every column.
        table: What the user knows the table by.
    """
    columns = "\n".join(f"  {name}: {_shorten(value)}" for name, value in examples.items()) or "  (no column)"
    has_none = setting == "caption_column" and problem.startswith("no ")
    also = ", or instance_prompt to give every image one caption" if has_none else ""
    raise DataError(f"{table} has {problem}; set {setting} to one of its columns{also}:\n{columns}")


def _wanted(setting: str, wanted: str, examples: Mapping[str, Any], table: str) -> str:
    if wanted not in examples:
        refuse_columns(setting, f"no column {wanted}", examples, table)
    return wanted


def _usual(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The columns that have one of the names, in whatever letters; the likeliest first."""
    usual = [column for column in columns if column.strip().lower() in names]
    return sorted(usual, key=lambda column: names.index(column.strip().lower()))


def _may_be_image(value: Any) -> bool:
    if isinstance(value, str):
        return PurePosixPath(value).suffix.lower() in SUFFIXES and "://" not in value
    return isinstance(value, bytes | dict) and bool(value)


def _only(
    setting: str, columns: list[str], preferred: Sequence[str], examples: Mapping[str, Any], table: str
) -> str | None:
    """The preferred column, or the only one; a choice among others is the user's."""
    usual = _usual(columns, preferred)
    if usual or len(columns) < 2:
        return (usual or columns or [None])[0]
    what = "images" if setting == "image_column" else "captions"
    problem = f"{len(columns)} columns that could be the {what} ({', '.join(columns)})"
    refuse_columns(setting, problem, examples, table)


def _shorten(value: Any) -> str:
    # The bytes of a picture would fill the terminal, and tell nobody what the column is.
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return "an image"
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
