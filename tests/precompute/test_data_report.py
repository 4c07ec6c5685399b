"""The look at all data before anything heavy: what it says, and that it loads no weights and writes
nothing.
"""

import shutil

import pytest
from PIL import Image

from lora_utils import stages
from lora_utils.cli import main
from lora_utils.model.base import PretrainedSdxl
from tests.conftest import TINY


@pytest.fixture
def messy(pictures):
    """The ten pictures with company."""
    (pictures / "broken.png").write_bytes((pictures / "ink_01.png").read_bytes()[:100])
    (pictures / "broken.txt").write_text("a broken picture")
    shutil.copy(pictures / "ink_01.png", pictures / "twin.png")
    (pictures / "twin.txt").write_text("the same picture")
    Image.open(pictures / "ink_03.png").resize((80, 80)).save(pictures / "nearly.jpg")
    (pictures / "nearly.txt").write_text("nearly the same picture, " + "with many words, " * 40)
    Image.new("RGBA", (20, 50), (255, 0, 0, 9)).save(pictures / "small.png")
    (pictures / "small.txt").write_text("a small see-through picture")
    (pictures / "silent.png").write_bytes((pictures / "ink_01.png").read_bytes())
    return pictures


@pytest.mark.parametrize("workers", [0, 2])
def test_every_problem_is_named(make_config, messy, workers):
    report = stages.check_data(make_config(train_data_dir=messy, dataloader_num_workers=workers))
    said = {(finding.source, finding.kind, finding.problem.split(" (")[0]) for finding in report.findings}
    assert said == {
        ("silent.png", "refused", "no caption"),
        ("broken.png", "refused", "damaged"),
        ("twin.png", "noticed", "same picture as another"),
        ("nearly.jpg", "noticed", "nearly the same picture as another"),
        ("nearly.jpg", "noticed", "caption too long"),
        ("small.png", "noticed", "smaller than its frame"),
        ("small.png", "noticed", "much is cropped away"),
        ("small.png", "fixed", "transparent pixels"),
    }
    assert len(report.examples) == 13


def test_counts_shapes_lengths_and_steps_are_told(make_config, messy):
    buckets = {"enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 8}
    config = make_config(
        train_data_dir=messy,
        num_repeats=2,
        validation_split=0.25,
        max_train_steps=None,
        num_train_epochs=5,
        **buckets,
    )
    text = str(stages.check_data(config))
    assert "13 usable, 3 images held out, 2 refused" in text
    assert "64x64" in text
    assert "40x96" in text
    assert "1 too long for 77" in text
    assert "steps of 2 visits, 5.0 epochs of" in text
    assert text.index("left out") < text.index("laid over white") < text.index("as ink_01.png")


def test_it_agrees_with_what_precompute_uses(make_config, messy):
    config = make_config(train_data_dir=messy)
    report, found = stages.check_data(config), stages.precompute(config)
    assert [one.example.source for one in report.examples] == [entry.source for entry in found.entries]
    refused = [
        {f.source for f in findings if f.kind == "refused"} for findings in (report.findings, found.findings)
    ]
    assert refused[0] == refused[1]


def test_no_weights_are_loaded_and_nothing_is_written(make_config, messy, tmp_path, monkeypatch):
    for part in ("load_vae", "load_text_pipeline", "load_unet", "load_unet_pipeline"):
        monkeypatch.setattr(PretrainedSdxl, part, lambda *_: pytest.fail("weights were loaded"))
    before = sorted(tmp_path.rglob("*"))
    stages.check_data(make_config(train_data_dir=messy))
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_base_model_lengths_are_counted_later(make_config, pictures):
    report = stages.check_data(
        make_config(train_data_dir=pictures, pretrained_model_name_or_path="nobody/nothing")
    )
    assert report.token_counts is None
    assert "counted by precompute" in str(report)


def test_from_the_command_line(messy, capsys):
    options = [
        "--train_data_dir",
        str(messy),
        "--resolution",
        "64",
        "64",
        "--pretrained_model_name_or_path",
        str(TINY),
    ]
    assert main(["check", "--data", *options]) == 0
    out = capsys.readouterr().out
    assert "broken.png" in out
    assert "left out" in out
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--data", *options])


def test_no_data_is_an_error(tmp_path, capsys):
    assert main(["check", "--data", "--train_data_dir", str(tmp_path)]) == 2
    assert "put images there" in capsys.readouterr().err
