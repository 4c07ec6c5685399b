"""What the program itself has written is no data, wherever it lies and whichever run's it is."""

import json
import shutil
from dataclasses import asdict

import pytest
from PIL import Image

from lora_utils import stages
from lora_utils.compare.png import save_image, save_sheet
from lora_utils.compare.sampling import SamplingSettings, Shot
from lora_utils.config.errors import ConfigError
from lora_utils.config.loading import dump_config, load_config
from lora_utils.config.schema import RunConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.examples import DataError
from lora_utils.data.inspection import inspect_examples

CONFIG = dump_config(RunConfig())
PACK = "images-000001-0123abcd.safetensors"
PICTURES = {"baseline_000_seed0.png": b"", "finetuned_000_seed0.png": b""}
RUN = "folder of a run"
COMPARISON = "folder of a comparison"
# What lies in a folder below the data besides a picture, and what it is told to be; empty where it is data.
FOLDERS = {
    "a run that has begun": ({"config.yaml": CONFIG, "versions.json": "{}"}, RUN),
    "a run that has ended": ({"config.yaml": CONFIG, "summary.json": "{}", PACK: ""}, RUN),
    "a run that was cut short": ({"config.yaml": CONFIG, "checkpoints/step-000000003/state.json": "{}"}, RUN),
    "a run without its summary": ({"config.yaml": CONFIG, "metrics.jsonl": ""}, RUN),
    "a comparison": ({"config.yaml": CONFIG, "sheet.png": b""}, COMPARISON),
    "a comparison without its sheet": ({"config.yaml": CONFIG, **PICTURES}, COMPARISON),
    "a config of the user's": ({"config.yaml": CONFIG}, ""),
    "another program's run": ({"config.yaml": "lora: 1\nmodel: x", "summary.json": "{}"}, ""),
    "a run in pictures alone": (PICTURES, ""),
    "a config that is no text": ({"config.yaml": b"\xff\0" * 99, "summary.json": "{}"}, ""),
    "a cache among pictures": ({PACK: ""}, ""),
}
WITHOUT_PICTURES = {
    "a cache": ({PACK: "", "index.jsonl": ""}, "cache of a run"),
    "a mirror": ({"checkpoints/step-000000003/state.json": "{}"}, "checkpoints of a run"),
}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def find(folder, **settings):
    overrides = {"train_data_dir": folder, "instance_prompt": "a dog"} | settings
    return find_examples(load_config(None, overrides).data)


@pytest.mark.parametrize("depth", ["x", "some/where/x"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_below_the_data_is_known_by_what_is_in_it(tmp_path, name, depth):
    files, what = FOLDERS[name]
    write(tmp_path, {"a.png": ""})
    write(tmp_path / depth, files | {"drawn.png": "", "more/drawn.png": ""})
    found = find(tmp_path)
    told = [finding.source for finding in found.findings if "written by this program" in finding.problem]
    assert told == [depth] * bool(what)
    sources = {example.source for example in found.examples}
    assert {"a.png"} <= sources
    assert (f"{depth}/drawn.png" in sources) == (f"{depth}/more/drawn.png" in sources) == (not what)


@pytest.mark.parametrize("name", WITHOUT_PICTURES)
def test_caches_and_mirrors_are_one_line_of_the_table(tmp_path, name):
    files, what = WITHOUT_PICTURES[name]
    write(write(tmp_path, {"a.png": ""}) / "x", files)
    assert [finding.problem for finding in find(tmp_path).findings] == [
        f"{what} (written by this program)",
        "no caption",
    ]


def test_several_runs_are_told_in_one_line(tmp_path):
    write(tmp_path, {"a.png": ""})
    for number in range(3):
        write(tmp_path / "runs" / str(number), FOLDERS["a run that has ended"][0])
    told = [finding for finding in find(tmp_path).findings if "run" in finding.problem]
    assert [(finding.source, finding.action) for finding in told] == [("runs/0 and 2 more", "left out")]


@pytest.mark.parametrize("door", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("name", [name for name, (_, what) in FOLDERS.items() if what])
def test_a_folder_of_output_as_data_is_an_error_with_its_cure(tmp_path, name, door):
    write(tmp_path, FOLDERS[name][0] | {"a.png": ""})
    with pytest.raises(DataError, match=rf"is the {FOLDERS[name][1]} .*; set {door} to the folder of your"):
        find_examples(load_config(None, {door: tmp_path, "instance_prompt": "x"}).data)


@pytest.mark.parametrize("name", ["output_dir", "infer_path"])
def test_output_into_the_folder_of_the_data_is_refused_before_anything(tmp_path, name):
    (tmp_path / "sub").mkdir()
    settings = {"train_data_dir": [tmp_path / "sub", tmp_path], name: tmp_path / "sub" / ".."}
    with pytest.raises(ConfigError, match=rf"{name} and train_data_dir are both .*; set {name} to another"):
        load_config(None, settings)
    load_config(None, settings | {name: tmp_path / "sub" / "lora"})


def test_a_picture_that_was_drawn_is_refused_wherever_it_lies(tmp_path):
    facts = asdict(Shot("a dog 犬", 0)) | asdict(SamplingSettings(64, 64, 3, 4.0, None, 77, False))
    save_image(Image.new("RGB", (64, 64)), tmp_path / "drawn.png", facts | {"adapter_scale": 1.0})
    save_sheet(Image.new("RGB", (64, 64)), tmp_path / "sheet.png")
    Image.open(tmp_path / "drawn.png").save(tmp_path / "anew.png")
    config = load_config(None, {"train_data_dir": tmp_path, "instance_prompt": "x", "resolution": 64}).data
    usable, findings = inspect_examples(find_examples(config).examples, config)
    assert [example.example.source for example in usable] == ["anew.png"]
    assert [(finding.source, finding.problem) for finding in findings] == [
        ("drawn.png", "picture that compare has drawn"),
        ("sheet.png", "picture that compare has drawn"),
    ]
    assert "save it anew" in findings[0].action


def test_the_same_command_goes_on_after_pictures_were_drawn_below_the_data(make_config, pictures):
    settings = {
        "train_data_dir": pictures,
        "output_dir": pictures / "lora",
        "resume_from_checkpoint": "latest",
    }
    list(stages.train(make_config(**settings, max_train_steps=2)))
    stages.compare(make_config(**settings))
    shutil.copytree(pictures / "lora", pictures / "backup" / "of the run")

    assert [report.step for report in stages.train(make_config(**settings, max_train_steps=3))] == [3]
    assert json.loads((pictures / "lora" / "summary.json").read_text())["status"] == "done"
    report = stages.check_data(make_config(**settings))
    assert len(report.examples) == 10
    assert "backup/of the run and 1 more" in str(report)
