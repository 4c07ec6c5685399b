"""The front door: where training examples come from.

Either folders of images with captions (train_data_dir), or a dataset (dataset_name): of the Hub, of this disk, or a
Python file of your own. Nothing of an image is read here.
"""

from dataclasses import replace
from pathlib import Path

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import TRIGGER, Captioner, clean_caption
from lora_utils.data.examples import DataError, Example, FoundExamples
from lora_utils.data.findings import Remarks, showable, table
from lora_utils.data.images import SUFFIXES
from lora_utils.data.sources.file_tree import METADATA
from lora_utils.data.sources.folders import find_in_folders
from lora_utils.data.sources.hub import holds_images
from lora_utils.data.sources.python_file import find_in_python_file
from lora_utils.data.sources.tables import find_in_table


def find_examples(config: DataConfig) -> FoundExamples:
    """Every image with its captions, and what was wrong with the others.

    Raises:
        DataError: There is nothing to learn from, or a setting is missing or wrong; the message says what to do.
    """
    remarks = Remarks()
    instance_prompt = clean_caption(config.instance_prompt or "")[0] or None
    examples, rule = _find(config.model_copy(update={"instance_prompt": instance_prompt}), remarks)
    for example in examples:
        if config.trigger_word is None and any(TRIGGER in caption for caption in example.captions):
            remarks.tally(
                example.source, f"{TRIGGER} without trigger_word", "used as it is; set trigger_word"
            )
    findings, where = remarks.findings(), rule.partition(";")[0]
    if not examples and not any(finding.kind == "refused" for finding in findings):
        listed = f"\n{table(findings)}" if findings else ""
        raise DataError(
            f"there are no {where}; put images there ({', '.join(sorted(SUFFIXES))}), or name a folder of tables, such "
            f"as parquet files, as dataset_name{listed}"
        )
    if not examples:
        raise DataError(f"none of the {where} can be used; do what the last column says\n{table(findings)}")
    return FoundExamples(
        [replace(one, source=showable(one.source)) for one in examples], findings, showable(rule)
    )


def _find(config: DataConfig, remarks: Remarks) -> tuple[list[Example], str]:
    captioner, name = Captioner(remarks, config.instance_prompt), (config.dataset_name or "").strip()
    if not name and not config.train_data_dir:
        raise DataError(
            "neither train_data_dir nor dataset_name is set; set train_data_dir to the folder of your images and "
            "captions, or dataset_name to a dataset of the Hub such as lambdalabs/naruto-blip-captions"
        )
    if not name:
        return find_in_folders(config, captioner)
    own, folder = name.endswith(".py"), Path(name).expanduser()
    if config.train_data_dir and not own:
        raise DataError(
            "train_data_dir and dataset_name are both set; set one of both (only a Python file takes both)"
        )
    if folder.is_dir() and not own and holds_images(folder):
        split = folder / config.dataset_split
        described = any((folder / file).exists() for file in METADATA)
        if config.dataset_split != "train" and not split.is_dir():
            raise DataError(
                f"{folder} holds images but no folder {split.name}; set dataset_split to a sub-folder"
            )
        folders = [split if split.is_dir() and not described else folder]
        return find_in_folders(config.model_copy(update={"train_data_dir": folders}), captioner)
    if config.mask_data_dir:
        raise DataError(f"masks need a folder of images; set train_data_dir instead of dataset_name={name}")
    return find_in_python_file(config, captioner) if own else find_in_table(config, captioner)


def look_for_examples(config: DataConfig) -> FoundExamples | None:
    """The examples of folders; None of a dataset, which would have to be loaded, and where nothing is set.

    Raises:
        DataError: As ``find_examples``.
    """
    return find_examples(config) if config.train_data_dir else None


def describe_data(config: DataConfig, found: FoundExamples | None) -> str:
    """What is known of the data at a glance, on one line.

    Args:
        config: Where the data comes from.
        found: From ``look_for_examples``.
    """
    if found is not None:
        refused = sum(finding.kind == "refused" for finding in found.findings)
        counts = f"{len(found.examples)} captioned images, {refused} refused"
        return f"{counts}; check --data looks into them; {found.rule}"
    if config.dataset_name:
        return f"{config.dataset_name}; check --data loads it and looks into it"
    return "neither train_data_dir nor dataset_name is set"
