"""Opens datasets of the Hub and of the disk with the library datasets, and says what to do when that fails.

The library fails in some twenty ways, with the cause often wrapped in others. `_CURES` turns what is known of
them into advice.
"""

import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError  # what torch raises when it has refused to run something
from typing import TYPE_CHECKING, NoReturn

from lora_utils.config.data import DataConfig
from lora_utils.data.examples import DataError
from lora_utils.data.findings import Remarks
from lora_utils.data.formats import SUFFIXES
from lora_utils.data.sources.arrow_types import plain_copy
from lora_utils.data.sources.file_tree import METADATA, list_files
from lora_utils.data.sources.text_tables import CSV_ENDINGS, csv_files, load_csv, tables_of_images
from lora_utils.system.locations import looked_for, looks_like_path

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
_BUILDERS |= dict.fromkeys(CSV_ENDINGS, "csv")
# All that damaged files were seen to make its readers raise.
_FAILURES = (
    *(OSError, EOFError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError),
    *(ArithmeticError, AssertionError, UnpicklingError, struct.error),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error),
)
_HUB_SECONDS = 10  # to wait for an answer
_MOST_DENSE = 200  # text is packed to a tenth
_FORMATS = {"arrow", "audiofolder", "csv", "imagefolder", "json", "parquet", "text"}
_FORMATS |= {"videofolder", "webdataset"}
_PUT_DATA = "put tables (parquet, csv, jsonl) or images there"
_GO_ONLINE = "connect to the internet and unset HF_HUB_OFFLINE, or set dataset_name to a folder"
# Cures by what the message or the name of an error holds; the first that fits is given, special ones first.
_CURES = {
    "scripts are no longer supported": (
        "it is made by a Python script, and nothing of a dataset is executed here. Either fetch its parquet "
        'copy once, datasets.load_dataset("{name}", revision="refs/convert/parquet", split="{split}")'
        '.save_to_disk("my_dataset"), '
        "and set dataset_name=my_dataset, or set dataset_name to a Python file of your own (docs/data.md)"
    ),
    "Config name is missing": "set dataset_config_name to one of these",
    "BuilderConfig": "set dataset_config_name to one of these",
    "nknown split": "set dataset_split to one of these",
    "corresponds to no data": "set dataset_split to a larger part",
    "Unrecognized instruction": (
        "set dataset_split to a split such as train, or to a part such as train[:500]"
    ),
    "trust_remote_code": (
        "nothing of a dataset is executed here; set dataset_name to a Python file of your own"
    ),
    "DatasetNotFoundError": (
        "check the name on huggingface.co/datasets; a private or gated one needs your HF_TOKEN and accepted "
        "terms"
    ),
    "EmptyDatasetError": _PUT_DATA,
    "DataFilesNotFoundError": _PUT_DATA,
    "ConnectionError": _GO_ONLINE,
    "OfflineModeIsEnabled": _GO_ONLINE,
    "UnicodeDecodeError": "save its files as UTF-8",
    "No space left": "free some disk space, or set HF_HOME to a folder on a larger disk",
    "datasets dtype equivalent": (
        "fetch its files (hf download {name} --repo-type dataset --local-dir my_dataset), which can be read "
        "here, and set dataset_name=my_dataset"
    ),
    "ImportError": "install what is missing",
}


def holds_images(folder: Path, config: DataConfig) -> bool:
    """Whether a local dataset is a folder of images rather than of tables.

    Args:
        folder: The dataset.
        config: May name the columns of tables.
    """
    # What save_to_disk has written; images in it belong to its tables.
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return False
    files = [PurePosixPath(name) for name in list_files(folder, "", (), Remarks())]
    described = any(file.name.lower() in METADATA for file in files)
    return _has_images(files) and (described or not tables_of_images(folder, _tables(files), files, config))


def load_table(config: DataConfig, remarks: Remarks) -> "Dataset":
    """One split of dataset_name; the library's progress bars are turned off.

    Args:
        config: Which dataset: a Hub id, or a local folder or file; which configuration, such as a language,
            and which split of it.
        remarks: Takes up bad lines.

    Raises:
        DataError: It cannot be loaded; the message says what to do.
    """
    import datasets  # here, as it takes seconds to load, and --help and folders need none of it
    import yaml
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    name = config.dataset_name or ""
    split = config.dataset_split
    path = Path(name).expanduser()
    check_name(name)
    try:
        _check_archives(path)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = _load_files(path, config, remarks)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:  # in the words of datasets, so that _CURES knows it
                raise ValueError(f"Unknown split {split}. Should be one of {list(loaded)}")
            loaded = loaded[split]
    except (DatasetsError, yaml.YAMLError, *_FAILURES) as error:
        _refuse(name, split, error)
    if not isinstance(loaded, datasets.Dataset) or not len(loaded):
        raise DataError(f"{name}[{split}] has no rows; set dataset_split to a split with images")
    return loaded


def _load_files(path: Path, config: DataConfig, remarks: Remarks) -> "Dataset | DatasetDict":
    import datasets
    from datasets import config as library

    split = config.dataset_split
    cache = Path(library.HF_DATASETS_CACHE)
    file = _table_file(path, config)
    if file:
        base = split.partition("[")[0]
        if file.suffix.lower() in CSV_ENDINGS:
            return load_csv({base: [file]}, split, remarks)
        files = {base: str(plain_copy(file, cache))}
        return datasets.load_dataset(_BUILDERS[file.suffix.lower()], data_files=files, split=split)

    name = config.dataset_name or ""
    if not path.exists() and not _is_cached(name):
        _ask_hub(name)
    source = str(plain_copy(path, cache)) if path.exists() else name
    builder = datasets.load_dataset_builder(source, config.dataset_config_name)
    if files := csv_files(builder):
        return load_csv(files, split, remarks)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def check_name(name: str) -> None:
    """Refuse a dataset_name that can be no dataset, before the library asks the Hub for it.

    Raises:
        DataError: It is an address, a path with nothing there, or a file of another kind.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if "://" in name:
        raise DataError(f"{name} is an address; set dataset_name to what follows huggingface.co/datasets/")
    if path.exists() and path.suffix.lower() not in _BUILDERS:
        raise DataError(
            f"{name} is neither a table ({', '.join(_BUILDERS)}) nor a Python file; "
            "unpack it if it is an archive, and set dataset_name to the folder"
        )
    is_path = looks_like_path(name) or path.suffix in _BUILDERS
    if not path.exists() and is_path:
        raise DataError(
            f"there is no folder or file {looked_for(name)}; "
            "set dataset_name to one, or to a Hub id such as user/name"
        )
    if name in _FORMATS:
        raise DataError(
            f"{name} is a format, not a dataset; set train_data_dir to a folder of images with captions "
            "instead, or dataset_name to a table"
        )


def _is_cached(name: str) -> bool:
    """Whether a dataset of the Hub was loaded before: its name in the folder of the library's copies."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE, name.replace("/", "___").lower()).exists()


def _ask_hub(name: str) -> None:
    """Ask once whether there is such a dataset, as the library would try for half a minute.

    Raises:
        DataError: There is none, or the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except OfflineModeIsEnabled:
        return  # the library knows by itself, and may have a copy
    except RepositoryNotFoundError as error:
        raise DataError(
            f"there is no folder {looked_for(name)}, and the Hub shows no dataset of this name; "
            f"{_CURES['DatasetNotFoundError']}"
        ) from error
    except (HTTPError, OSError) as error:
        raise DataError(
            f"there is no folder {looked_for(name)}, and the Hub cannot be reached; {_GO_ONLINE}"
        ) from error


def _check_archives(folder: Path) -> None:
    """The library unpacks every zip file, however large its content is."""
    names = list_files(folder, "", (), Remarks()) if folder.is_dir() else []
    for archive in [folder / name for name in names if name.lower().endswith(".zip")]:
        if archive.is_file() and zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                unpacked = sum(info.file_size for info in file.infolist())
            # zlib packs zeros to a thousandth: 10 MiB that someone offers would fill the disk.
            if unpacked > _MOST_DENSE * archive.stat().st_size:
                raise DataError(
                    f"{archive} would be {unpacked / 2**20:,.0f} MiB, {_MOST_DENSE} times as large as it is, "
                    "which neither pictures nor tables are; look into it, and unpack it yourself if it is "
                    "what you want"
                )


def _table_file(path: Path, config: DataConfig) -> Path | None:
    """The file that is meant where datasets itself would go by the images that lie beside the tables."""
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    files = [PurePosixPath(name) for name in sorted(list_files(path, "", (), Remarks()))]
    if not _has_images(files):
        return None
    tables = tables_of_images(path, _tables(files), files, config)
    if not tables:
        return None

    # By the split's name as a word, as datasets does it: train.csv, data/train-00.parquet, not trained.csv.
    word = rf"(?<![a-z]){re.escape(config.dataset_split.partition('[')[0])}(?![a-z])"
    meant = [file for file in tables if re.search(word, file.as_posix())] or tables
    if len(meant) > 1:
        names = ", ".join(file.as_posix() for file in meant[:5])
        raise DataError(f"{path} holds several tables ({names}); set dataset_name to the one that is meant")
    return path / meant[0]


def _has_images(files: Iterable[PurePosixPath]) -> bool:
    return any(file.suffix.lower() in SUFFIXES for file in files)


def _tables(files: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    return [file for file in files if file.suffix.lower() in _BUILDERS and file.name.lower() not in METADATA]


def _refuse(name: str, split: str, error: BaseException) -> NoReturn:
    """Raise the failure's root cause in a few words, with its cure."""
    # The library wraps errors: the last cause says what happened, the names on the way what it happened to.
    names: list[str] = []
    root: BaseException = error
    cause: BaseException | None = error
    while cause is not None:
        root = cause
        names += [ancestor.__name__ for ancestor in type(cause).__mro__]
        cause = cause.__cause__

    reason = " ".join(str(root).split())
    signs = " ".join([reason, *names])
    cure = "check its files, or fetch them anew"
    for sign, advice in _CURES.items():
        if sign in signs:
            cure = advice
            break
    shown = reason if len(reason) <= 300 else reason[:299] + "…"
    raise DataError(f"{name} cannot be loaded ({shown}); {cure.format(name=name, split=split)}") from error
