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
OBJECTS = (
    "car",
    "truck",
    "bus",
    "traffic light",
    "traffic sign",
    "person",
    "rider",
    "bicycle",
    "motorcycle",
    "train",
)
OBJECTS += ("van", "trailer", "caravan", "vehicle")
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
    paths = sorted(path.relative_to(data_dir) for path in data_dir.rglob("[!.]*"))
    images = [
        path for path in paths if "images" in path.parts and path.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    labels = [
        path for path in paths if path.suffix == ".json" and ("labels" in path.parts or len(path.parts) == 1)
    ]
    wanted = {path.stem: path for path in reversed(_prefer_train(images))}
    facts, nameless = _read_labels([data_dir / path for path in labels])
    if not (names := sorted(wanted.keys() & facts.keys())):
        found = (
            f"{len(images)} images, {len(labels)} label files, {len(facts)} labels but none of such an image"
        )
        raise FileNotFoundError(f"{data_dir} is not laid out like BDD100K: {LAYOUT}; found are {found}")
    for name in names:
        yield wanted[name], caption(*facts[name])
    absent, unlabelled = len(facts.keys() - {path.stem for path in images}), len(wanted) - len(names)
    skipped = (
        f"{absent} labels of absent images, {unlabelled} images without label, {nameless} labels without name"
    )
    if absent or unlabelled or nameless:
        warnings.warn(f"{data_dir}: skipped {skipped}", stacklevel=2)


def caption(attributes: Mapping[str, str], counts: Counter[str]) -> str:
    """Such as ``a city street on a rainy night, with 3 cars, a bus and a person``: well below CLIP's 77
    tokens.

    Args:
        attributes: ``weather``, ``scene`` and ``timeofday`` in BDD100K's words; others are not mentioned.
        counts: How many there are of each of OBJECTS; the five most frequent are named.
    """
    weather, scene, time = (attributes.get(key, "") for key in ("weather", "scene", "timeofday"))
    scene = RENAMED.get(scene, scene)
    text = f"a {scene}" if scene in SCENES else "a road"
    if weather in WEATHERS and time in ("daytime", "night"):
        text += f" on {'an' if weather == 'overcast' else 'a'} {weather} {time.removesuffix('time')}"
    else:
        text += f" {TIMES[time]}" if time in TIMES else ""
        text += f" in {weather} weather" if weather in WEATHERS else ""
    frequent = [name for name in sorted(OBJECTS, key=lambda name: -counts[name]) if counts[name]][:5]
    amounts = [_amount(name, counts[name]) for name in frequent]
    listed = " and ".join(filter(None, (", ".join(amounts[:-1]), *amounts[-1:])))
    return f"{text}, with {listed}" if listed else text


def _amount(name: str, count: int) -> str:
    plural = PLURALS.get(name, f"{name}s")
    return f"a {name}" if count == 1 else f"{count} {plural}" if count <= 10 else f"many {plural}"


def _prefer_train(images: list[Path]) -> list[Path]:
    splits = {path: re.match(r"(.*/)(train|val|test)/", f"/{path.as_posix()}") for path in images}
    with_train = {split[1] for split in splits.values() if split and split[2] == "train"}
    return [
        path
        for path, split in splits.items()
        if not split or split[2] == "train" or split[1] not in with_train
    ]


def _read_labels(files: list[Path]) -> tuple[dict[str, tuple[dict[str, str], Counter[str]]], int]:
    """By image name, the known attributes and the fullest count of objects; and how many entries had no
    name.
    """
    facts: dict[str, tuple[dict[str, str], Counter[str]]] = {}
    nameless = 0
    for record in (record for file in files for record in stream_records(file)):
        if not isinstance(record, dict) or not isinstance(record.get("name"), str):
            nameless += 1
            continue
        name = re.sub(r"\.(jpe?g|png)$", "", record["name"])
        attributes, counts = facts.get(name, ({}, Counter()))
        said = (record.get("attributes") or {}).items()
        known = {key: value for key, value in said if value not in (None, "undefined")}
        facts[name] = attributes | known, max(counts, _count_objects(record), key=Counter.total)
    return facts, nameless


def _count_objects(record: Mapping[str, Any]) -> Counter[str]:
    frames = record.get("frames") or [{}]
    categories = [box.get("category") for box in record.get("labels") or frames[0].get("objects") or []]
    names = [RENAMED.get(category, category) for category in categories]
    return Counter(name for name in names if name in OBJECTS)


def stream_records(file: Path, chunk_bytes: int = 1 << 18) -> Iterator[Any]:
    """The elements of a JSON list (of 1.2 GB) one by one, or a lone object; ValueError names the byte of
    damage.
    """
    with file.open(
        encoding="latin-1", newline=""
    ) as stream:  # so that a character is a byte; the labels are ASCII
        head = stream.read(64)
        text = head.lstrip("\xef\xbb\xbf \t\r\n")
        passed_bytes = len(head) - len(text)
        if text[:1] != "[":
            text, passed_bytes = f",{text}{stream.read()}]", passed_bytes - 1
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
            text, passed_bytes = text[end:], passed_bytes + end
        if (text[1:] + stream.read()).strip():
            raise ValueError(f"{file} is damaged at byte {passed_bytes + 1}: it goes on after its end")


def _first_value(text: str) -> tuple[list[Any], int]:
    """The value after the bracket or comma that the text begins with, if there is one; and where the next
    mark is.
    """
    space = re.compile(r"\s*")
    at = space.match(text, 1).end()
    if text[0] == "[" and text[at : at + 1] == "]":
        return [], at
    value, end = json.JSONDecoder().raw_decode(text, at)
    end = space.match(text, end).end()
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return [value], end
