"""Which column of a table holds the images and which the captions."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from lora_utils.data.examples import DataError

# By preference, as they occur on the Hub; the last ones are the endings that webdataset makes columns of.
IMAGE_NAMES = ("file_name", "image", "image_path", "path", "filename", "img", "jpg", "png", "webp")
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "prompts", "description", "tags", "sentence", "txt")


def choose_column(
    setting: str, wanted: str | None, names: Iterable[str], examples: Mapping[str, Any], table: str
) -> str | None:
    """The wanted column, else the first that is named as such columns usually are; None when there is none.

    Args:
        setting: image_column or caption_column.
        wanted: The value of that setting.
        names: Usual names in small letters, the likeliest first.
        examples: A value of every column.
        table: What the user knows the table by.

    Raises:
        DataError: The wanted column is not there.
    """
    if wanted is not None:
        if wanted not in examples:
            refuse_columns(setting, f"no column {wanted}", examples, table)
        return wanted

    # Backwards, so that of Text and text the first one stays.
    columns = {column.strip().lower(): column for column in reversed(list(examples))}
    for name in names:
        if name in columns:
            return columns[name]
    return None


def refuse_columns(setting: str, problem: str, examples: Mapping[str, Any], table: str) -> NoReturn:
    """Raise the error that shows the user what there is to choose from.

    Args:
        setting: image_column or caption_column.
        problem: What the table has, such as 'no column of captions'.
        examples: A value of every column.
        table: What the user knows the table by.
    """
    columns = "\n".join(f"  {name}: {_shorten(value)}" for name, value in examples.items()) or "  (no column)"
    also = ", or instance_prompt to give every image one caption" if setting == "caption_column" else ""
    raise DataError(f"{table} has {problem}; set {setting} to one of its columns{also}:\n{columns}")


def _shorten(value: Any) -> str:
    # The bytes of a picture would fill the terminal, and tell nobody what the column is.
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return "an image"
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
