"""The example of a dataset file of one's own, on a small folder in BDD100K's layouts."""

import importlib.util
import json
import tracemalloc
import warnings
from collections import Counter

import pytest
from PIL import Image

from tests.conftest import ROOT

RAINY_NIGHT = {"weather": "rainy", "scene": "city street", "timeofday": "night"}
CLEAR_DAY = {"weather": "clear", "scene": "highway", "timeofday": "daytime"}


@pytest.fixture(scope="module")
def bdd():
    spec = importlib.util.spec_from_file_location("bdd_dataset", ROOT / "examples" / "bdd_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """Two pictures for training, one for validation."""
    for split, name in (("train", "b"), ("train", "a"), ("val", "v")):
        picture(tmp_path / "images" / "100k" / split / f"{name}.jpg")
    return tmp_path


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (128, 72), "grey").save(path)


def write(path, content, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, **how), encoding="utf-8")


def boxes(*categories):
    return [
        {"category": category, "box2d": {"x1": 0.5, "y1": 1, "x2": 9, "y2": 9}} for category in categories
    ]


def entry(name, attributes=RAINY_NIGHT, labels=()):
    return {"name": name, "attributes": attributes, "labels": boxes(*labels)}


def read(bdd, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [(path.as_posix(), caption) for path, caption in bdd.load_examples(folder)]


@pytest.mark.parametrize(
    "file", ["labels/bdd100k_labels_images_train.json", "labels/det_20/det_train.json", "det.json"]
)
def test_one_list_for_each_split(bdd, folder, file):
    labels = ["car", "car", "person", "traffic light", "car", "lane", "drivable area"]
    write(folder / file, [entry("b.jpg", labels=labels), entry("a.jpg", CLEAR_DAY)], indent=4)
    write(folder / "labels" / "det_20" / "det_val.json", [entry("v.jpg", CLEAR_DAY)])
    assert read(bdd, folder) == [
        ("images/100k/train/a.jpg", "a highway on a clear day"),
        (
            "images/100k/train/b.jpg",
            "a city street on a rainy night, with 3 cars, a traffic light and a person",
        ),
    ]


def test_one_file_for_each_image(bdd, folder):
    for name, split in (("a", "train"), ("b", "train"), ("v", "val")):
        categories = boxes("bike", "motor", "bus", "bus", "area/drivable", "lane/road curb")
        content = {
            "name": name,
            "attributes": CLEAR_DAY,
            "frames": [{"timestamp": 10000, "objects": categories}],
        }
        write(folder / "labels" / "100k" / split / f"{name}.json", content)
    caption = "a highway on a clear day, with 2 buses, a bicycle and a motorcycle"
    assert read(bdd, folder) == [("images/100k/train/a.jpg", caption), ("images/100k/train/b.jpg", caption)]


def test_validation_images_serve_where_there_are_no_others(bdd, tmp_path):
    picture(tmp_path / "bdd100k" / "images" / "100k" / "val" / "v.jpg")
    write(tmp_path / "bdd100k" / "labels" / "det_20" / "det_val.json", [entry("v.jpg")])
    assert read(bdd, tmp_path) == [("bdd100k/images/100k/val/v.jpg", "a city street on a rainy night")]


def test_files_about_the_same_image_are_put_together(bdd, folder):
    lane = {"weather": "undefined", "scene": "tunnel"}
    write(
        folder / "labels" / "a_lane.json",
        [entry("a.jpg", CLEAR_DAY, ["crosswalk"]), entry("b.jpg", CLEAR_DAY)],
    )
    write(folder / "labels" / "b_det.json", [entry("a.jpg", lane, ["car", "pedestrian", "pedestrian"])])
    write(folder / "labels" / "c_old.json", [entry("a.jpg", {}, ["person", "bike"])])
    assert read(bdd, folder)[0][1] == "a tunnel on a clear day, with 2 people and a car"


@pytest.mark.parametrize(
    ("weather", "scene", "timeofday", "caption"),
    [
        ("overcast", "residential", "daytime", "a residential street on an overcast day"),
        ("partly cloudy", "gas stations", "night", "a gas station on a partly cloudy night"),
        ("snowy", "parking lot", "dawn/dusk", "a parking lot at dawn or dusk in snowy weather"),
        ("undefined", "tunnel", "daytime", "a tunnel by day"),
        ("undefined", "highway", "night", "a highway at night"),
        ("foggy", "city street", "undefined", "a city street in foggy weather"),
        ("undefined", "undefined", "dawn/dusk", "a road at dawn or dusk"),
        ("undefined", "undefined", "undefined", "a road"),
    ],
)
def test_undefined_attributes_are_not_mentioned(bdd, weather, scene, timeofday, caption):
    assert bdd.caption({"weather": weather, "scene": scene, "timeofday": timeofday}, Counter()) == caption


@pytest.mark.parametrize(
    ("counts", "objects"),
    [
        ({"person": 1}, "a person"),
        ({"person": 2, "rider": 2}, "2 people and 2 riders"),
        ({"car": 11, "bus": 10}, "many cars and 10 buses"),
        ({"traffic sign": 2, "train": 1, "car": 1}, "2 traffic signs, a car and a train"),
        (
            {"car": 6, "truck": 5, "bus": 4, "traffic light": 3, "bicycle": 2, "motorcycle": 1},
            "6 cars, 5 trucks, 4 buses, 3 traffic lights and 2 bicycles",
        ),
    ],
)
def test_objects_are_counted_and_the_five_most_frequent_named(bdd, counts, objects):
    assert bdd.caption({}, Counter(counts)) == f"a road, with {objects}"


def test_the_longest_caption_is_short(bdd):
    attributes = {"weather": "partly cloudy", "scene": "residential", "timeofday": "dawn/dusk"}
    assert len(bdd.caption(attributes, Counter(dict.fromkeys(bdd.OBJECTS, 10))).split()) <= 30


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("how", [{}, {"indent": 4}, {"separators": (",", ":")}, {"ensure_ascii": True}])
def test_a_list_is_the_same_however_it_is_cut(bdd, tmp_path, chunk_bytes, how):
    records = [
        entry("a.jpg", labels=["car"] * count) | {"odd": ['"]},\\', -1.5e-7, None, "ü"]} for count in range(9)
    ]
    records += [1, 12, [], {}, "", [{}], True]
    file = tmp_path / "labels.json"
    for content in (records, [], [[]]):
        file.write_text("\ufeff\n " + json.dumps(content, **how) + "\r\n", encoding="utf-8")
        found = list(bdd.stream_records(file, chunk_bytes))
        assert json.dumps(found).replace("\u00c3\u00bc", "ü") == json.dumps(content)


def test_a_long_list_is_read_in_little_memory_up_to_the_damage(bdd, tmp_path):
    whole = tmp_path / "whole.json"
    damaged = tmp_path / "damaged.json"
    text = json.dumps([entry(f"{number}.jpg", labels=["car"] * 100) for number in range(1000)])
    byte = text.index('"500.jpg"')
    whole.write_text(text)
    damaged.write_text(text[:byte] + "?" + text[byte + 1 :])
    tracemalloc.start()
    assert sum(1 for _ in bdd.stream_records(whole)) == 1000
    with pytest.raises(ValueError, match=f"byte {byte} "):
        sum(1 for _ in bdd.stream_records(damaged))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(text) / 3


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 18])
@pytest.mark.parametrize(
    ("damage", "byte"),
    [
        (lambda text: text[:-5], None),
        (lambda text: text[:1], 1),
        (lambda text: "", 0),
        (lambda text: text + "]", None),
        (lambda text: text[:30] + "\0" + text[31:], 30),
        (lambda text: text.replace("}, {", "} {", 1), None),
        (lambda text: text.replace("weather", 'wea"ther', 1), None),
        (lambda text: text.replace("[", "{", 1), None),
        (lambda text: text[1:], None),
        (lambda text: text.replace("]}", "}", 1), None),
    ],
)
def test_damage_is_named_with_file_and_byte(bdd, tmp_path, damage, byte, chunk_bytes):
    file = tmp_path / "labels.json"
    file.write_text(damage(json.dumps([entry(f"{number}.jpg", labels=["car"] * 9) for number in range(5)])))
    with pytest.raises(
        ValueError, match=rf"labels\.json is damaged at byte {'[0-9]+' if byte is None else byte}\b"
    ):
        list(bdd.stream_records(file, chunk_bytes))


def test_what_is_skipped_is_counted(bdd, folder):
    entries = [entry("a.jpg"), entry("v.jpg"), entry("gone.jpg"), entry("lost.jpg"), {"info": 1}, 3]
    write(folder / "labels" / "det_train.json", entries)
    with pytest.warns(
        UserWarning, match="2 labels of absent images, 1 images without label, 2 labels without name"
    ):
        assert len(list(bdd.load_examples(folder))) == 1


@pytest.mark.parametrize("labels", [{}, {"labels": None}, {"labels": []}, {"frames": []}, {"frames": [{}]}])
def test_an_image_without_objects_keeps_its_scene(bdd, folder, labels):
    write(
        folder / "l.json", [{"name": name, "attributes": CLEAR_DAY} | labels for name in ("a.jpg", "b.jpg")]
    )
    assert [caption for _, caption in read(bdd, folder)] == ["a highway on a clear day"] * 2


@pytest.mark.parametrize("attributes", [{}, {"attributes": None}, {"attributes": {"weather": None}}])
def test_an_image_without_attributes_is_a_road(bdd, folder, attributes):
    write(
        folder / "l.json",
        [{"name": name, "labels": boxes("car")} | attributes for name in ("a.jpg", "b.jpg")],
    )
    assert [caption for _, caption in read(bdd, folder)] == ["a road, with a car"] * 2


def test_another_layout_is_refused_with_what_is_expected(bdd, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for data_dir in (None, empty, folder):
        with pytest.raises(FileNotFoundError, match=r"images/.*labels/"):
            list(bdd.load_examples(data_dir))
    write(folder / "labels" / "det_train.json", [entry("elsewhere.jpg")])
    with pytest.raises(FileNotFoundError, match="3 images, 1 label files, 1 labels but none"):
        list(bdd.load_examples(folder))


def test_hidden_files_are_no_labels(bdd, folder):
    write(folder / "labels" / "det_train.json", [entry("a.jpg"), entry("b.jpg")])
    (folder / "labels" / "._det_train.json").write_bytes(b"\0\5\x16\7")
    (folder / "images" / "100k" / "train" / "._a.jpg").write_bytes(b"\0\5\x16\7")
    assert len(read(bdd, folder)) == 2
