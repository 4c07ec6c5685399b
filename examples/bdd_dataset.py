"""BDD100K with captions made from its labels: an example of a dataset file of your own.

    python -m lora_utils train --config bdd_a100 --train_data_dir /path/to/bdd100k

BDD100K (Yu et al., 2020) holds 1280x720 pictures from dashcams, labelled with weather, scene, time of day and
objects. All its label files are read, one list for each split or one file for each image; what they say about
the same image is put together. Where train lies beside val and test, only train is learned from.

For data of your own, copy this file, name it with ``--dataset_name my_dataset.py``, and let ``load_examples``
yield the path of each image, absolute or relative to ``data_dir``, with its caption, in the same order every
time.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LAYOUT = "it needs pictures under images/ and label files, labels/**/*.json or *.json beside images/"
WEATHERS = ("clear", "overcast", "partly cloudy", "rainy", "snowy", "foggy")
SCENES = ("city street", "highway", "parking lot", "tunnel", "residential street", "gas station")
TIMES = {"daytime": "by day", "night": "at night", "dawn/dusk": "at dawn or dusk"}
# What captions name, in this order where there are equally many. Lanes and drivable areas are no objects.
OBJECTS = ("car", "truck", "bus", "traffic light", "traffic sign", "person", "rider", "bicycle", "motorcycle")
OBJECTS += ("train", "van", "trailer", "caravan", "vehicle")
# The label versions of 2018 and 2020 differ in names.
RENAMED = {"pedestrian": "person", "other person": "person", "bike": "bicycle", "motor": "motorcycle"}
RENAMED |= {"other vehicle": "vehicle", "residential": "residential street", "gas stations": "gas station"}
PLURALS = {"bus": "buses", "person": "people"}


def load_examples(data_dir: Path | None) -> Iterator[tuple[Path, str]]:
    """Each labelled image, as a path relative to data_dir, with its caption; sorted by name.

    Raises:
        FileNotFoundError: There are no images, no labels, or none that belong together.
        ValueError: A label file is damaged.
    """
    if data_dir is None:
        raise FileNotFoundError(f"set train_data_dir to the folder of BDD100K: {LAYOUT}")

    images: list[Path] = []
    labels: list[Path] = []
    # Not names that begin with a dot: macOS leaves ._a.jpg beside a.jpg, which is no picture.
    for path in sorted(path.relative_to(data_dir) for path in data_dir.rglob("[!.]*")):
        if "images" in path.parts and path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            images.append(path)
        elif path.suffix == ".json" and ("labels" in path.parts or len(path.parts) == 1):
            labels.append(path)

    # By stem, as some label files name images with their ending and some without. Of two the first counts.
    wanted = {path.stem: path for path in reversed(_prefer_train(images))}
    facts, nameless = _read_labels([data_dir / path for path in labels])
    names = sorted(wanted.keys() & facts.keys())
    if not names:
        counts = (
            f"{len(images)} images, {len(labels)} label files, {len(facts)} labels but none of such an image"
        )
        raise FileNotFoundError(f"{data_dir} is not laid out like BDD100K: {LAYOUT}; found are {counts}")

    for name in names:
        yield wanted[name], caption(*facts[name])

    # At the end, once: a half-unpacked download looks like a small data set otherwise.
    absent = len(facts.keys() - {path.stem for path in images})
    unlabelled = len(wanted) - len(names)
    skipped = (
        f"{absent} labels of absent images, {unlabelled} images without label, {nameless} labels without name"
    )
    if absent or unlabelled or nameless:
        warnings.warn(f"{data_dir}: skipped {skipped}", stacklevel=2)


def caption(attributes: Mapping[str, str], counts: Counter[str]) -> str:
    """Such as ``a city street on a rainy night, with 3 cars and a person``: well below CLIP's 77 tokens.

    Args:
        attributes: ``weather``, ``scene`` and ``timeofday`` in BDD100K's words; others are not mentioned.
        counts: How many there are of each of OBJECTS; the five most frequent are named.
    """
    weather, scene, time = (attributes.get(key, "") for key in ("weather", "scene", "timeofday"))
    scene = RENAMED.get(scene, scene)
    text = f"a {scene}" if scene in SCENES else "a road"

    # "on a rainy day" reads well only where both are known; else each is said on its own.
    if weather in WEATHERS and time in ("daytime", "night"):
        text += f" on {'an' if weather == 'overcast' else 'a'} {weather} {time.removesuffix('time')}"
    else:
        text += f" {TIMES[time]}" if time in TIMES else ""
        text += f" in {weather} weather" if weather in WEATHERS else ""

    # Sorting is stable, so equally many stand in the order of OBJECTS, and a caption is the same every time.
    frequent = [name for name in sorted(OBJECTS, key=lambda name: -counts[name]) if counts[name]][:5]
    amounts = [_amount(name, counts[name]) for name in frequent]
    listed = " and ".join(filter(None, (", ".join(amounts[:-1]), *amounts[-1:])))
    return f"{text}, with {listed}" if listed else text


def _amount(name: str, count: int) -> str:
    if count == 1:
        return f"a {name}"
    plural = PLURALS.get(name, f"{name}s")
    # Nobody prompts for 37 cars, and CLIP does not count that far.
    return f"{count} {plural}" if count <= 10 else f"many {plural}"


def _prefer_train(images: list[Path]) -> list[Path]:
    """The images without those of val and test that lie beside a train."""
    splits = {path: re.match(r"(.*/)(train|val|test)/", f"/{path.as_posix()}") for path in images}
    with_train = {split[1] for split in splits.values() if split and split[2] == "train"}
    preferred = []
    for path, split in splits.items():
        # Who downloaded val alone wants to learn from it.
        if split is None or split[2] == "train" or split[1] not in with_train:
            preferred.append(path)
    return preferred


def _read_labels(files: list[Path]) -> tuple[dict[str, tuple[dict[str, str], Counter[str]]], int]:
    """By image name, the known attributes and the fullest count of objects; and how many lack a name."""
    facts: dict[str, tuple[dict[str, str], Counter[str]]] = {}
    nameless = 0
    # One record at a time: the list of the training labels has 1.2 GB, and as objects of Python far more.
    for record in (record for file in files for record in stream_records(file)):
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            nameless += 1
            continue
        name = re.sub(r"\.(jpe?g|png)$", "", record["name"])
        attributes, counts = facts.get(name, ({}, Counter()))
        labelled = (record.get("attributes") or {}).items()
        defined = {key: value for key, value in labelled if value not in (None, "undefined")}
        # The fullest count, not the sum: label files about detection and tracking box the same cars.
        facts[name] = (attributes | defined, max(counts, _count_objects(record), key=Counter.total))
    return facts, nameless


def _count_objects(record: Mapping[str, Any]) -> Counter[str]:
    # Boxes are under "labels", or, in files for one image each, under "objects" of the first frame.
    frames = record.get("frames") or [{}]
    categories = [box.get("category") for box in record.get("labels") or frames[0].get("objects") or []]
    names = [RENAMED.get(category, category) for category in categories]
    return Counter(name for name in names if name in OBJECTS)


def stream_records(file: Path, chunk_bytes: int = 1 << 18) -> Iterator[Any]:
    """The elements of a JSON list (of 1.2 GB) one by one, or a lone object; a ValueError names damage."""
    # Latin-1, so that a character is a byte and can be named; the labels are ASCII.
    with file.open(encoding="latin-1", newline="") as stream:
        head = stream.read(64)
        text = head.lstrip("\xef\xbb\xbf \t\r\n")  # the first three are a byte-order mark
        passed_bytes = len(head) - len(text)
        if text[:1] != "[":
            # A lone object is read as the rest of a list, whose comma is not in the file.
            text = f",{text}{stream.read()}]"
            passed_bytes -= 1
        while text[0] != "]":
            try:
                values, end = _first_value(text)
            except json.JSONDecodeError as error:
                # What only the end of the piece cuts off fails there, or in a string without end.
                cut_off = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
                piece = stream.read(max(chunk_bytes, len(text))) if cut_off else ""
                if not piece:
                    problem = f"damaged at byte {passed_bytes + error.pos} ({error.msg})"
                    raise ValueError(f"{file} is {problem}; unpack or download it again") from None
                text += piece
                continue
            yield from values
            text = text[end:]
            passed_bytes += end
        if (text[1:] + stream.read()).strip():
            raise ValueError(f"{file} is damaged at byte {passed_bytes + 1}: it goes on after its end")


def _first_value(text: str) -> tuple[list[Any], int]:
    """The value after the bracket or comma that the text begins with, if any; and where the next mark is."""
    space = re.compile(r"\s*")
    start = space.match(text, 1).end()
    if text[0] == "[" and text[start : start + 1] == "]":
        return [], start
    value, end = json.JSONDecoder().raw_decode(text, start)
    end = space.match(text, end).end()
    # Without a mark behind it a number may go on in the next piece: 1 may become 12.
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return [value], end
