"""The front door: where training examples come from.

Either folders of images with captions (train_data_dir), or a dataset (dataset_name): of the Hub, of this
disk, or a Python file of your own. Nothing of an image is read here.
"""

from dataclasses import replace
from pathlib import Path

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import TRIGGER, Captioner, clean_caption
from lora_utils.data.examples import DataError, Example, FoundExamples
from lora_utils.data.findings import Remarks, showable, table
from lora_utils.data.formats import SUFFIXES
from lora_utils.data.sources.file_tree import METADATA
from lora_utils.data.sources.folders import find_in_folders
from lora_utils.data.sources.hub import check_name, holds_images
from lora_utils.data.sources.own_output import refuse_output
from lora_utils.data.sources.python_file import find_in_python_file
from lora_utils.data.sources.tables import find_in_table


def find_examples(config: DataConfig) -> FoundExamples:
    """Every image with its captions, and what was wrong with the others.

    Raises:
        DataError: There is nothing to learn from, or a setting is missing or wrong; it says what to do.
    """
    remarks = Remarks()
    # A prompt of white space alone is none; else it would hide every missing caption behind an empty one.
    instance_prompt = clean_caption(config.instance_prompt or "")[0] or None
    examples, rule = _find(config.model_copy(update={"instance_prompt": instance_prompt}), remarks)

    if config.trigger_word is None:
        # The captions come from a data set that was made for another tool's placeholder.
        for example in examples:
            if any(TRIGGER in caption for caption in example.captions):
                remarks.tally(
                    example.source, f"{TRIGGER} without trigger_word", "used as it is; set trigger_word"
                )

    findings = remarks.findings()
    images = rule.partition(";")[0]  # 'images of x, y', without where captions come from
    # Two errors: of a folder without images the cure is another folder, of refused images what each needs.
    if not examples and not any(finding.kind == "refused" for finding in findings):
        listed = f"\n{table(findings)}" if findings else ""
        raise DataError(
            f"there are no {images}; put images there ({', '.join(sorted(SUFFIXES))}), or name a folder of "
            f"tables, such as parquet files, as dataset_name{listed}"
        )
    if not examples:
        raise DataError(f"none of the {images} can be used; do what the last column says\n{table(findings)}")

    # Sources are names from outside that will be printed and stored; the terminal must survive them.
    shown = [replace(example, source=showable(example.source)) for example in examples]
    return FoundExamples(shown, findings, showable(rule))


def _find(config: DataConfig, remarks: Remarks) -> tuple[list[Example], str]:
    """Choose among the sources.

    Contradicting settings are an error: a silent winner would train on the wrong data.
    """
    captioner = Captioner(remarks, config.instance_prompt, config.caption_lines)
    name = (config.dataset_name or "").strip()
    if not name and not config.train_data_dir:
        raise DataError(
            "neither train_data_dir nor dataset_name is set; set train_data_dir to the folder of your images "
            "and captions, or dataset_name to a dataset of the Hub such as lambdalabs/naruto-blip-captions"
        )
    if not name:
        return find_in_folders(config, captioner)

    is_python_file = name.endswith(".py")
    if config.train_data_dir and not is_python_file:
        raise DataError(
            "train_data_dir and dataset_name are both set; set one of both (only a Python file takes both)"
        )
    folder = Path(name).expanduser()
    if not is_python_file and folder.is_dir():
        refuse_output(folder, "dataset_name")
    if not is_python_file and folder.is_dir() and holds_images(folder, config):
        # Not left to datasets' imagefolder, which knows no caption files and decodes what it lists.
        folders = [_split_folder(folder, config.dataset_split)]
        return find_in_folders(config.model_copy(update={"train_data_dir": folders}), captioner)

    if config.mask_data_dir:
        raise DataError(f"masks need a folder of images; set train_data_dir instead of dataset_name={name}")
    # A Python file by its ending alone, even where it is absent: better "there is no file" than a Hub search.
    if is_python_file:
        return find_in_python_file(config, captioner)
    return find_in_table(config, captioner)


def _split_folder(folder: Path, name: str) -> Path:
    """The sub-folder of a split; the folder itself where its own metadata describes all of it."""
    split = folder / name
    if name != "train" and not split.is_dir():
        raise DataError(
            f"{folder} holds images but no folder {split.name}; set dataset_split to a sub-folder"
        )
    # metadata.csv beside train/ names files as train/a.png, so the folder above is what it describes.
    is_described = any((folder / file).exists() for file in METADATA)
    return split if split.is_dir() and not is_described else folder


def look_for_examples(config: DataConfig) -> FoundExamples | None:
    """The examples of folders; None of a dataset, which would have to be loaded, and where nothing is set.

    Raises:
        DataError: As ``find_examples``.
    """
    name = (config.dataset_name or "").strip()
    if name and not name.endswith(".py"):
        check_name(name)
    return find_examples(config) if config.train_data_dir else None


def describe_data(config: DataConfig, found_examples: FoundExamples | None) -> str:
    """What is known of the data at a glance, on one line.

    Args:
        config: Where the data comes from.
        found_examples: From ``look_for_examples``.
    """
    # The commands that show this shall be quick, so each line ends with what would tell more.
    if found_examples is not None:
        refused = sum(finding.kind == "refused" for finding in found_examples.findings)
        counts = f"{len(found_examples.examples)} captioned images, {refused} refused"
        return f"{counts}; check --data looks into them; {found_examples.rule}"
    if config.dataset_name:
        return f"{config.dataset_name}; check --data loads it and looks into it"
    return "neither train_data_dir nor dataset_name is set"
