"""Pictures on disk: tried first, written as they come, told truly, and never of two comparisons at once."""

import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lora_utils import stages
from lora_utils.cli import main
from lora_utils.compare import album, comparison, png, sampling
from lora_utils.compare.album import AlbumError
from lora_utils.config.loading import load_config
from lora_utils.config.strict_yaml import read_yaml
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.lora import LoraError

STEPS = {"num_inference_steps": 1, "guidance_scale": 1.0}


def compare(run, **settings):
    return stages.compare(load_config(None, {"lora_path": run, "prompt": ["a", "b", "c"]} | STEPS | settings))


def names(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(prompts, seeds=(0,)):
    numbers = range(1, prompts + 1)
    pairs = {
        f"{way}_{number:03d}_seed{seed}.png"
        for way in ("baseline", "finetuned")
        for number in numbers
        for seed in seeds
    }
    return pairs | {"sheet.png", "config.yaml"}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ["d", "e"]},
        {"prompt": ["a"]},
        {"prompt": ["a", "b", "c", "d"]},
        {"prompt": ["c", "b", "a"]},
        {"seeds": [7, 8]},
        {"adapter_scale": 0.5},
        {"num_inference_steps": 2},
    ],
    ids=str,
)
def test_a_second_comparison_never_mixes_with_the_first(run, changes):
    folder = run / "compare"
    compare(run)
    first = {name: (folder / name).read_bytes() for name in names(folder)}
    assert first.keys() == expected(3)
    strangers = ("notes.txt", "baseline_mine.png", "finetuned_001.png", "sheet_of_mine.png", "mine/sheet.png")
    (folder / "mine").mkdir()
    for name in strangers:
        (folder / name).write_text(name)

    compare(run, **changes)
    seeds = changes.get("seeds", (0,))
    assert names(folder) == expected(len(changes.get("prompt", "abc")), seeds) | set(strangers[:4])
    assert all((folder / name).read_text() == name for name in strangers)
    assert {name: (folder / "earlier-1" / name).read_bytes() for name in first} == first
    drawn = read_yaml(folder / "config.yaml")["compare"]
    assert {name: drawn[name] for name in changes} == changes
    for path in folder.glob("*_seed*.png"):
        facts = read_facts(path)
        assert facts["prompt"] in drawn["prompt"]
        assert facts["seed"] in drawn["seeds"]


def read_facts(path):
    import json

    with Image.open(path) as image:
        return json.loads(image.text["lora_utils"])


def test_the_same_comparison_again_leaves_no_copy(run, caplog):
    compare(run)
    before = contents(run)
    compare(run)
    assert contents(run) == before
    assert not (run / "compare" / "earlier-1").exists()
    assert "are all among the new ones" in caplog.text


def test_every_comparison_that_differs_gets_a_number(run):
    for scale in (0.25, 0.5, 0.75):
        compare(run, adapter_scale=scale, prompt="a")
    folder = run / "compare"
    scales = {
        name: read_yaml(folder / name / "config.yaml")["compare"]["adapter_scale"]
        for name in ("earlier-1", "earlier-2", ".")
    }
    assert scales == {"earlier-1": 0.25, "earlier-2": 0.5, ".": 0.75}


def test_pictures_say_which_lora_drew_them(run):
    from lora_utils.system.files import file_hash

    drawn = compare(run, prompt="a").folder
    weights = run / "pytorch_lora_weights.safetensors"
    assert read_facts(drawn / "finetuned_001_seed0.png")["lora_sha256"] == file_hash(weights)
    assert "lora_sha256" not in read_facts(drawn / "baseline_001_seed0.png")
    assert read_yaml(drawn / "config.yaml")["compare"]["lora_path"] == str(weights)


def test_what_is_named_twice_is_drawn_once_and_numbers_mean_the_prompt(run):
    drawn = compare(run, prompt=["a", "b", "a", "c"], seeds=[42, 3, 42])
    assert names(drawn.folder) == expected(3, (42, 3))
    for number, prompt in enumerate("abc", 1):
        for seed in (3, 42):
            facts = read_facts(drawn.folder / f"finetuned_{number:03d}_seed{seed}.png")
            assert (facts["prompt"], facts["seed"]) == (prompt, seed)


def test_a_second_interruption_stops_at_once_and_says_so(run, monkeypatch):
    compare(run)
    before = contents(run)
    interrupt_at(monkeypatch, sampling, "draw_latents", 3)
    interrupt_at(monkeypatch, sampling, "plan_decoding", 1)
    with pytest.raises(KeyboardInterrupt, match="no picture was written, and nothing changed"):
        compare(run, prompt=["another", "and another"])
    assert contents(run) == before


def test_a_comparison_that_was_interrupted_and_made_again_leaves_no_copy(run, monkeypatch):
    interrupt_at(monkeypatch, sampling, "draw_latents", 4)
    with pytest.raises(KeyboardInterrupt):
        compare(run)
    monkeypatch.undo()
    compare(run)
    assert contents(run / "compare").keys() == set(map(Path, expected(3)))


@pytest.mark.parametrize("name", ["sheet.png", "config.yaml", "finetuned_001_seed0.png"])
def test_what_the_user_made_of_a_comparison_is_kept(run, name):
    changed = compare(run).folder / name
    changed.write_bytes(b"mine")
    compare(run)
    assert (run / "compare" / "earlier-1" / name).read_bytes() == b"mine"
    assert changed.read_bytes() != b"mine"


def interrupt_at(monkeypatch, module, name, call, number=signal.SIGINT):
    """Send this process a real signal in the middle of the n-th call."""
    done = SimpleNamespace(calls=0)
    original = getattr(module, name)

    def wrapper(*arguments, **named):
        done.calls += 1
        if done.calls == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, wrapper)


@pytest.mark.parametrize("call", [2, 3, 4, 6])
def test_an_interruption_while_drawing_keeps_what_is_drawn(run, monkeypatch, call):
    folder = run / "compare"
    compare(run, prompt=["older", "and older"])
    whole = compare(run, infer_path=run / "whole").folder
    interrupt_at(monkeypatch, sampling, "draw_latents", call)
    with pytest.raises(KeyboardInterrupt, match=rf"^{call - 1} of 6 pictures are in {folder}"):
        compare(run)
    order = [f"{way}_{n:03d}_seed0.png" for n in (1, 2, 3) for way in ("baseline", "finetuned")]
    sheet = {"sheet.png"} if call > 2 else set()
    assert names(folder) == {*order[: call - 1], "config.yaml"} | sheet
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in order[: call - 1])
    assert names(folder / "earlier-1") == expected(2)

    monkeypatch.undo()
    compare(run, prompt=["another"])
    assert names(folder) == expected(1)
    assert names(folder / "earlier-2") == {*order[: call - 1], "config.yaml"} | sheet


def test_an_interruption_before_the_first_picture_leaves_all_as_it_was(run, monkeypatch):
    compare(run)
    before = contents(run)
    interrupt_at(monkeypatch, sampling, "draw_latents", 1)
    with pytest.raises(KeyboardInterrupt, match="no picture was written, and nothing changed"):
        compare(run, prompt="another")
    assert contents(run) == before


def test_an_interruption_while_writing_stops_there(run, monkeypatch):
    interrupt_at(monkeypatch, sampling, "decode_latents", 4)
    with pytest.raises(KeyboardInterrupt, match=r"^3 of 6 pictures are in .*, side by side in sheet.png"):
        compare(run)
    pictures = {"baseline_001_seed0.png", "finetuned_001_seed0.png", "baseline_002_seed0.png"}
    assert names(run / "compare") == {*pictures, "sheet.png", "config.yaml"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_command_line_says_what_is_kept(run, monkeypatch, capsys, number):
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    interrupt_at(monkeypatch, sampling, "draw_latents", 3, number)
    arguments = ["compare", "--lora_path", str(run), "--prompt", "a", "b", "--num_inference_steps", "1"]
    try:
        assert main(arguments) == 130
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    output = capsys.readouterr()
    first = output.out.splitlines()[0]
    assert first.startswith("drawing 4 pictures (prompts: 2, seeds: 1,")
    assert "64x64 px" in first
    assert str(run / "compare") in first
    last = output.err.splitlines()[-1]
    assert last == f"stopped; 2 of 4 pictures are in {run / 'compare'}, side by side in sheet.png"
    assert "resume_from_checkpoint" not in output.err


def test_a_disk_that_fills_up_says_what_is_kept(run, monkeypatch):
    calls = []
    save = png.save_image

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments)

    monkeypatch.setattr(comparison, "save_image", failing)
    with pytest.raises(AlbumError, match=r"No space left on device\), and 3 of 6 pictures are in"):
        compare(run)
    assert len(names(run / "compare")) == 4


def as_file(path):
    path.write_text("mine")
    return path


def below_a_file(path):
    return as_file(path) / "pictures"


def link_to_nothing(path):
    path.symlink_to(path.with_name("absent"))
    return path


def with_file(name):
    def make(path):
        path.mkdir()
        (path / name).write_text("mine")
        return path

    return make


def run_folder(path):
    return path.with_name("run")


def too_long(path):
    return path / ("x" * 300)


TARGETS = {
    "a file": (as_file, "is a file"),
    "below a file": (below_a_file, "is a file"),
    "a link to nothing": (link_to_nothing, "is a link to nothing"),
    "a name that is too long": (too_long, "File name too long"),
    "no folder of files": (lambda path: Path("/proc/pictures"), "pictures cannot be written into"),
    "a run folder": (run_folder, "run holds a LoRA"),
    "a folder of LoRAs": (with_file("downloaded.safetensors"), "holds a LoRA"),
    "another's config": (with_file("config.yaml"), "config.yaml is of no comparison"),
    "another's sheet": (with_file("sheet.png"), "sheet.png is of no comparison"),
    "another's picture": (with_file("baseline_001_seed0.png"), "seed0.png is of no comparison"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_tried_before_anything_is_loaded(run, tmp_path, monkeypatch, name):
    make, words = TARGETS[name]
    target = make(tmp_path / "target")
    monkeypatch.setattr(PretrainedSdxl, "examine", None)  # would raise a TypeError
    before = contents(tmp_path)
    with pytest.raises(AlbumError, match=words) as caught:
        compare(run, infer_path=target)
    assert "set infer_path to another folder" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert contents(tmp_path) == before


def test_a_disk_without_room_is_found_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(album.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(AlbumError, match="6 pictures take some"):
        compare(run, infer_path=tmp_path / "deep" / "er")
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_may_not_be_written_is_found_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    with pytest.raises(AlbumError, match="nothing may be written into"):
        compare(run, infer_path=tmp_path / "theirs" / "pictures")


@pytest.mark.parametrize("make", [lambda path: path, with_file("notes.txt")], ids=["new", "with notes"])
def test_a_lora_that_does_not_fit_leaves_no_trace(run, tmp_path, make):
    from safetensors.torch import load_file, save_file
    from torch import zeros

    weights = run / "pytorch_lora_weights.safetensors"
    save_file({name: zeros(4, 640) for name in load_file(weights)}, weights)
    target = make(tmp_path / "target")
    before = contents(tmp_path)
    with pytest.raises(LoraError):
        compare(run, infer_path=target)
    assert contents(tmp_path) == before
    assert target.exists() == any(path.is_relative_to("target") for path in before)


@pytest.mark.parametrize("given", ["lora_path", "lora_path and output_dir", "output_dir", "infer_path"])
def test_pictures_go_beside_their_weights_or_where_they_are_sent(run, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    settings, folder = {
        "lora_path": ({"lora_path": run}, run / "compare"),
        "lora_path and output_dir": ({"lora_path": run, "output_dir": "other"}, Path("other/compare")),
        "output_dir": ({"lora_path": None, "output_dir": run}, run / "compare"),
        "infer_path": ({"lora_path": run, "infer_path": "sent"}, Path("sent")),
    }[given]
    assert compare(run, prompt="a", **settings).folder == folder
    assert names(folder) == expected(1)
