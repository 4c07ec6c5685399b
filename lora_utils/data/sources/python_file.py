"""The user's own Python file as a dataset.

It defines ``load_examples(data_dir: Path | None)``, which yields ``(image, caption)``. An image is a path,
absolute or relative to data_dir; or the bytes of an image file; or a PIL image, which is kept in memory as
PNG. A caption is a string or a list of strings. The file is run as it is, and what it raises is not caught:
its traceback shows the user's own line.
"""

import hashlib
import inspect
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import Captioner
from lora_utils.data.examples import DataError, Example
from lora_utils.data.findings import Remarks
from lora_utils.data.formats import UNREADABLE_SUFFIXES, named
from lora_utils.data.images import read_bytes
from lora_utils.data.sources.file_tree import file_problem, trusted_root
from lora_utils.data.sources.names import alike
from lora_utils.system.locations import looked_for

_SIGNATURE = "load_examples(data_dir)"


def find_in_python_file(config: DataConfig, captioner: Captioner) -> tuple[list[Example], str]:
    """What the file dataset_name yields, and the rule by which it was found.

    Raises:
        DataError: The file is missing, lacks the function, or yields something else.
    """
    path = Path(config.dataset_name or "").expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}; set dataset_name to your Python file")
    data_dir = _data_dir(config)
    examples: dict[str, Example] = {}
    for number, (image, caption) in enumerate(_run(path, data_dir), start=1):
        position = f"example {number} of {path.name}"
        source, read = _find_image(image, data_dir, position, captioner.remarks)
        if read is None:
            continue  # refused, with a remark

        # An error, not a refusal: wrong types are a mistake in the code, and concern every image.
        texts = caption if isinstance(caption, list) else [caption]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{position}: the caption is {_show(caption)}; yield a string or a list of strings"
            )
        captions = captioner.caption(source, caption, "yield what it shows")
        if captions:
            if source in examples:  # a path may be yielded again with another caption
                source = f"{source} ({position})"
            examples[source] = Example(source, read, captions, config.num_repeats[0])

    rule = f"images and captions from {path.name}, {_SIGNATURE}"
    if captioner.instance_prompt:
        rule += ", else instance_prompt"
    return list(examples.values()), rule


def _data_dir(config: DataConfig) -> Path | None:
    folders = [folder.expanduser() for folder in config.train_data_dir or []]
    if len(folders) > 1:
        raise DataError(
            f"{config.dataset_name} gets one folder; set train_data_dir to one, not {len(folders)}"
        )
    if folders and not folders[0].is_dir():
        raise DataError(
            f"there is no folder {looked_for(folders[0])}; set train_data_dir to the folder of your data"
        )
    return folders[0] if folders else None


def _run(path: Path, data_dir: Path | None) -> Iterator[tuple[Any, Any]]:
    """What the file yields, as pairs. It is read afresh each time, and leaves no module and no __pycache__.

    In a notebook the user edits the file and runs the cell again: an import would give the old code.
    """
    # The path's hash keeps it from hiding a real module of the same name.
    name = f"_own_dataset_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:12]}"
    loader = SourceFileLoader(name, str(path.resolve()))
    module = ModuleType(name)
    module.__file__ = loader.path
    sys.modules[name] = module  # where dataclasses look for it
    try:
        exec(loader.source_to_code(loader.get_data(loader.path), loader.path), vars(module))
        items = _load_examples(module, path)(data_dir)
        if not isinstance(items, Iterable):
            raise DataError(
                f"{path.name}: {_SIGNATURE} returns {_show(items)}; let it yield (image, caption)"
            )
        for number, item in enumerate(items, start=1):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise DataError(f"example {number} of {path.name} is {_show(item)}; yield (image, caption)")
            yield item[0], item[1]
    finally:
        del sys.modules[name]


def _load_examples(module: ModuleType, path: Path) -> Callable[[Path | None], Any]:
    function = getattr(module, "load_examples", None)
    if not callable(function):
        raise DataError(f"{path.name} has no function {_SIGNATURE}; define it, yielding (image, caption)")
    try:
        inspect.signature(function).bind(None)
    # Bound, not called: a TypeError of the call may be one from within the function.
    except TypeError as error:
        raise DataError(
            f"{path.name}: load_examples does not fit ({error}); define it as {_SIGNATURE}"
        ) from error
    return function


def _find_image(
    image: Any, data_dir: Path | None, position: str, remarks: Remarks
) -> tuple[str, Callable[[], bytes] | None]:
    """What the image is known by, and what reads it; None when it was refused."""
    if isinstance(image, str | Path):
        return _find_file(str(image), data_dir, position, remarks)
    if isinstance(image, Image.Image):
        return position, partial(bytes, _encode(image, position))
    if isinstance(image, bytes | bytearray | memoryview) and len(image):
        return position, partial(bytes, bytes(image))
    raise DataError(
        f"{position}: the image is {_show(image)}; yield a path, the bytes of a file, or a PIL image"
    )


def _find_file(
    name: str, data_dir: Path | None, position: str, remarks: Remarks
) -> tuple[str, Callable[[], bytes] | None]:
    if "://" in name:
        raise DataError(
            f"{position}: {name:.60} is an address; download the image and yield its path or bytes"
        )
    if data_dir is None and not Path(name).is_absolute():
        raise DataError(
            f"{position}: {name:.60} is relative; set train_data_dir to the folder that it is relative to"
        )
    path = _as_stored(Path(name) if data_dir is None else data_dir / name)
    if data_dir is not None and path.is_relative_to(data_dir) and ".." not in path.parts:
        root = trusted_root(data_dir)
        source = path.relative_to(data_dir).as_posix()
    else:
        # The user's own code may name any file; still no link may lead from there to elsewhere.
        root = path.parent.resolve()
        source = name

    suffix = path.suffix.lower()
    if suffix in UNREADABLE_SUFFIXES:
        remarks.refuse(
            source, f"kind of picture that cannot be read ({named(suffix)})", "save it as PNG or JPEG"
        )
    elif problem := file_problem(path, root):
        remarks.add(problem.of(source))
    else:
        return source, partial(read_bytes, path, root)
    return source, None


def _as_stored(path: Path) -> Path:
    """The path itself, or the only one in its folder whose name looks the same."""
    if path.exists() or path.name.isascii() or not path.parent.is_dir():
        return path
    twins = [twin for twin in path.parent.iterdir() if alike(twin.name) == alike(path.name)]
    return twins[0] if len(twins) == 1 else path


def _encode(image: Image.Image, position: str) -> bytes:
    # PNG loses nothing and takes less memory than pixels; level 1, as packing tighter costs seconds.
    content = io.BytesIO()
    try:
        image.save(content, "PNG", compress_level=1, exif=image.getexif())  # EXIF may ask for a turn
    except OSError as error:
        action = "yield a whole image in mode RGB, RGBA or L"
        raise DataError(
            f"{position}: the PIL image of mode {image.mode} cannot be kept ({error}); {action}"
        ) from error
    return content.getvalue()


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"
