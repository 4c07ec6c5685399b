"""The front door: where training examples come from."""

from dataclasses import dataclass
from pathlib import Path

from lora_utils import UserError
from lora_utils.config import DataConfig
from lora_utils.images import find_images


class DataError(UserError):
    """The training data is incomplete; every problem is named."""


@dataclass(frozen=True)
class Example:
    """One image file and its caption."""

    path: Path
    caption: str


def find_examples(config: DataConfig) -> list[Example]:
    """The captioned images of the training folder, sorted by name.

    Raises:
        DataError: No folder is set, or an image lacks a readable caption.
        ImageError: The folder is missing or holds no image.
    """
    if config.train_data_dir is None:
        raise DataError("train_data_dir is not set; give the folder that holds your images and captions")
    paths = find_images(config.train_data_dir)
    problems: list[str] = []
    examples = [Example(path, _read_caption(path, config.caption_extension, problems)) for path in paths]
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise DataError(f"{len(problems)} of {len(paths)} images in {config.train_data_dir} lack a caption:\n  {shown}")
    return examples


def _read_caption(image: Path, extension: str, problems: list[str]) -> str:
    path = image.with_suffix(extension)
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        problems.append(f"{image.name}: write what it shows into {path.name}")
        return ""
    except UnicodeDecodeError:
        problems.append(f"{image.name}: {path.name} is not UTF-8 text; save it as UTF-8")
        return ""
    if not caption:
        problems.append(f"{image.name}: {path.name} is empty; write what the image shows into it")
    return caption
