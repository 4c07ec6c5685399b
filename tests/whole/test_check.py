"""What check says, when, and with which exit code."""

import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_utils import checking, stages
from lora_utils.cli import main
from lora_utils.memory import machine, planning
from lora_utils.memory.machine import unwritable
from lora_utils.model.architectures import UNET
from lora_utils.model.quantisation import left_in_full
from lora_utils.storage.log import read_summary
from lora_utils.system.locations import why_unwritable
from lora_utils.system.steps import Steps
from tests.conftest import ROOT, TINY


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Where forecasts are kept, for all tests here."""
    return tmp_path_factory.mktemp("counted")


@pytest.fixture
def options(data_dir, counted):
    """A small run of the tiny SDXL."""
    base = ["--pretrained_model_name_or_path", str(TINY), "--resolution", "64", "--max_train_steps", "2"]
    return [*base, "--cache_dir", str(counted), "--train_data_dir", str(data_dir)]


def fails(text):
    return [line for line in text.splitlines() if line.startswith("FAIL")]


def test_the_lines_are_the_check_and_only_trials_are_told_besides(make_config, tmp_path):
    config = make_config(cache_dir=tmp_path, train_batch_size=8, vram_gib=0.01)
    lines = Steps(checking.checking(config, "8gb"))
    told = list(lines)
    tried = [line for line in told if line.startswith("      trying ")]
    assert len(tried) >= 3
    assert [line for line in told if line not in tried] == str(lines.result).splitlines()
    assert lines.result.has_failed


def test_a_check_without_a_gpu_speaks_of_none(make_config):
    text = str(stages.check(make_config()))
    assert "GiB of RAM can be used" in text
    assert "GPU" not in text.replace("there is no GPU", "")


def test_the_settings_come_with_verbose_alone(options, capsys):
    for flags, are_shown in [([], False), (["--verbose"], True), (["--verbose", "--card", "t4"], True)]:
        assert main(["check", *options, *flags]) == 0
        assert ("rank: 16" in capsys.readouterr().out) == are_shown


def test_what_does_not_fit_exits_with_1(options, capsys):
    assert main(["check", "--card", "t4", *options]) == 0
    assert main(["check", "--card", "t4", "--vram_gib", "0.01", *options]) == 1
    assert fails(capsys.readouterr().out)


@pytest.mark.parametrize("setting", ["output_dir", "precompute_dir", "infer_path", "mirror_dir"])
@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below", "link"])
def test_a_folder_that_cannot_be_written_is_named(make_config, tmp_path, setting, path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "for ever")
    config = make_config(**{setting: tmp_path / path})
    [problem] = unwritable(config.paths, config.checkpoint)
    assert problem.startswith(f"{setting} {tmp_path / path} cannot be written")
    assert str(tmp_path / path.split("/")[0]) in problem


def test_such_a_folder_fails_the_check(options, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["check", *options, "--output_dir", str(tmp_path / "file" / "run")]) == 1
    [line] = fails(capsys.readouterr().out)
    assert line.startswith(f"FAIL  output_dir {tmp_path / 'file' / 'run'} cannot be written")


@pytest.mark.parametrize("setting", ["output_dir", "precompute_dir", "mirror_dir"])
@pytest.mark.parametrize("stage", ["precompute", "train"])
@pytest.mark.parametrize("path", ["file", "file/below"])
def test_no_stage_begins_or_waits_where_a_file_is_in_the_way(
    options, tmp_path, monkeypatch, capsys, setting, stage, path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    folders = {"output_dir": tmp_path / "run", "precompute_dir": tmp_path / "cache"}
    folders[setting] = tmp_path / path
    flags = [f"--{name}={folder}" for name, folder in folders.items()]
    assert main([stage, *options, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / path} cannot be" in error
    assert f"{tmp_path / 'file'} is a file; set " in error
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_is_full_may_be_read_alone(options, tmp_path, monkeypatch):
    flags = [f"--precompute_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'run'}"]
    assert main(["precompute", *options, *flags]) == 0
    said = "nothing may be written there"
    monkeypatch.setattr(machine, "why_unwritable", lambda path: said if path.name == "cache" else None)
    assert main(["precompute", *options, *flags]) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../missing", "no folder or file ../missing in "),
        ("./missing.parquet", "no folder or file ./missing.parquet in "),
        ("missing.csv", "no folder or file missing.csv in "),
        (r"C:\data\fox", r"no folder or file C:\data\fox in "),
        ("https://huggingface.co/datasets/a/b", "is an address"),
        ("imagefolder", "is a format"),
    ],
)
def test_check_refuses_a_dataset_that_train_would(options, tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    said = set()
    for command in (["check"], ["check", "--data"], ["train"]):
        assert main([*command, *options[:-2], "--dataset_name", name]) == 2
        said.add(capsys.readouterr().err.splitlines()[-1])
    [sentence] = said
    assert words in sentence


def test_folders_are_asked_for_at_the_nearest_that_exists(tmp_path):
    assert why_unwritable(tmp_path) is None
    assert why_unwritable(tmp_path / "a" / "b" / "c") is None
    assert "too long" in str(why_unwritable(tmp_path / ("x" * 300) / "y"))
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_used_exits_with_2(options, tmp_path, capsys):
    assert main(["check", "--data", *options]) == 0
    (tmp_path / "none").mkdir()
    assert main(["check", "--data", *options[:-2], "--train_data_dir", str(tmp_path / "none")]) == 2
    assert "no images of" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "loaded"), [(["--card", "6gb"], ""), ([], "torch")])
def test_the_first_lines_wait_for_no_library_of_models(options, flags, loaded):
    """In a process of its own: which of the large libraries are there when each line is told."""
    code = (
        "import sys; from lora_utils import cli, checking\n"
        f"command = cli.parse({['check', *options, *flags]!r})\n"
        "for line in checking.checking(command.config, command.card):\n"
        "    large = {'torch', 'diffusers', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "    print(line.split()[:1], *sorted(large))\n"
        "    if 'can be used' in line: break\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == (1 if flags else 9)
    assert lines[0].endswith("]"), "the first line waits for nothing"
    assert lines[-1].endswith(f"] {loaded}".rstrip())


def test_what_was_counted_once_needs_no_diffusers_again(options):
    assert main(["check", "--card", "t4", *options]) == 0
    code = (
        "import sys; from lora_utils.cli import main\n"
        f"assert main({['check', '--card', 't4', *options]!r}) == 0\n"
        "assert not {'diffusers', 'peft', 'transformers', 'bitsandbytes'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_a_card_that_is_too_small_for_one_example_is_counted_once(make_config, tmp_path, monkeypatch):
    counted = []
    whole = planning.training_footprint
    monkeypatch.setattr(planning, "training_footprint", lambda shape: counted.append(shape) or whole(shape))
    monkeypatch.setattr(planning.training_footprint, "__name__", "training_footprint", raising=False)
    assert (
        planning.largest_batch(make_config(cache_dir=tmp_path, vram_gib=0.001), checking.find_card("t4")) == 0
    )
    assert len(counted) == 1


@pytest.fixture
def odd_base(tmp_path):
    """A base whose finest transformers are 96 wide, which nf4's blocks of 64 do not divide."""
    folder = shutil.copytree(TINY, tmp_path / "odd", ignore=shutil.ignore_patterns("unet", "*.py"))
    config = UNet2DConditionModel.load_config(TINY / "unet")
    with torch.random.fork_rng():
        unet = UNet2DConditionModel.from_config(config, block_out_channels=(48, 96, 64), attention_head_dim=2)
    unet.save_pretrained(folder / "unet")
    return folder


def test_what_nf4_leaves_in_full_is_told_by_check_summary_and_forecast(
    make_config, odd_base, counted, caplog
):
    """Nothing of SDXL's, nor of the tiny U-Net's."""
    with torch.device("meta"):
        odd_unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(odd_base / "unet"))
        for config in (UNET, UNet2DConditionModel.load_config(TINY / "unet")):
            assert left_in_full(UNet2DConditionModel.from_config(config), "nf4") is None
    linears = [
        module
        for name, module in odd_unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attentions." in name
    ]
    odd = [linear for linear in linears if linear.in_features % 64]
    share = sum(linear.weight.numel() for linear in odd) / sum(linear.weight.numel() for linear in linears)
    sentence = f"{len(odd)} of {len(linears)} linears stay in full ({share:.0%} of the weights)"
    assert 0 < len(odd) < len(linears)

    config = make_config(base_precision="nf4", cache_dir=counted, pretrained_model_name_or_path=str(odd_base))
    forecast = stages.check(config).forecast
    assert sentence in str(stages.check(config, "t4"))
    assert sentence in str(forecast.left_in_full)
    assert len(list(stages.train(config))) == 3
    assert sentence in read_summary(config.paths.run_folder)["left_in_full"]
    assert sentence in caplog.text
    for precision in ("auto", "int8"):
        assert left_in_full(odd_unet, precision) is None
