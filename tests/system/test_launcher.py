"""``accelerate launch`` is obeyed, or contradicted aloud; its errors stay sentences."""

import json
import subprocess
import sys

import pytest

from lora_utils.cli import main
from lora_utils.system.device import MachineError, choose_precision
from lora_utils.system.launcher import AFTERWORD, SHARDING, LaunchError, contradictions, refuse_impossible
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for variable in ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND", "USE_CPU"):
        monkeypatch.delenv(f"ACCELERATE_{variable}", raising=False)


# What accelerate launch says, the setting, the card, what is chosen, and whether that is told.
PRECISIONS = """
    -     auto  cpu   fp32  -
    -     auto  t4    fp16  -
    -     bf16  cpu   bf16  -
    no    auto  cpu   fp32  -
    no    auto  t4    fp16  told
    no    auto  a100  bf16  told
    no    fp32  a100  fp32  -
    no    fp16  t4    fp16  told
    fp16  auto  t4    fp16  -
    fp16  auto  a100  fp16  -
    fp16  auto  cpu   fp32  told
    bf16  auto  a100  bf16  -
    bf16  auto  cpu   bf16  -
    bf16  fp32  a100  fp32  told
    fp16  bf16  a100  bf16  told
    fp16  fp32  cpu   fp32  told
    fp8   auto  a100  bf16  told
    fp8   auto  cpu   fp32  told
    BF16  auto  a100  bf16  -
"""
CARDS = {"t4": (7, 5), "a100": (8, 0), "cpu": None}


@pytest.mark.parametrize("row", [row for row in PRECISIONS.splitlines() if row.strip()])
def test_precision_is_obeyed_or_contradicted_aloud(monkeypatch, row):
    launched, setting, card, chosen, answer = row.split()
    if launched != "-":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    precision = choose_precision(setting, CARDS[card])
    lines = contradictions(precision.name, 4, False)
    assert precision.name == chosen
    assert len(lines) == (answer == "told")
    assert all(launched.lower() in line and chosen in line and "mixed_precision" in line for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("setting", ["auto", "bf16"])
def test_bf16_on_a_card_that_only_emulates_it_is_refused_whoever_asks(monkeypatch, setting):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(MachineError, match="sm_75: leave it out"):
        choose_precision(setting, CARDS["t4"])


def test_fp16_on_a_cpu_stays_refused_where_the_setting_says_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(MachineError, match="needs a CUDA GPU"):
        choose_precision("fp16", None)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "8", "gradient_accumulation_steps 8, and the setting's 4"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", None),
        ("GRADIENT_ACCUMULATION_STEPS", "auto", None),
        ("DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend inductor, and the run does not compile"),
        ("DYNAMO_BACKEND", "NO", None),
    ],
)
def test_what_the_settings_decide_is_said(monkeypatch, variable, value, words):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    lines = contradictions("fp32", 4, False)
    assert [words in line for line in lines] == ([True] if words else [])


@pytest.mark.parametrize("variable", SHARDING)
@pytest.mark.parametrize(
    ("value", "is_refused"), [("true", True), ("1", True), ("True", True), ("false", False)]
)
def test_what_would_shard_the_model_is_refused(monkeypatch, variable, value, is_refused):
    monkeypatch.setenv(variable, value)
    if not is_refused:
        refuse_impossible(has_gpu=False)
        return
    with pytest.raises(LaunchError, match="not used here"):
        refuse_impossible(has_gpu=False)


def test_a_gpu_that_is_not_to_be_used_is_to_be_hidden(monkeypatch):
    refuse_impossible(has_gpu=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    refuse_impossible(has_gpu=False)
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES"):
        refuse_impossible(has_gpu=True)


def test_a_run_says_all_of_it_before_anything_is_loaded(monkeypatch, tiny_settings, tmp_path, capsys, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    words = [
        "--lr_warmup_steps=9",
        "--num_train_epochs=1",
        "--gradient_accumulation_steps=32",
        "--optimizer=prodigy",
    ]
    places = [f"--{name}={value}" for name, value in tiny_settings.items()]
    assert main(["train", *places, *words, f"--output_dir={tmp_path / 'run'}"]) == 0
    told = [record.getMessage() for record in caplog.records]
    for sentence in (
        "accelerate launch says mixed_precision fp16, and fp32 is used",
        "accelerate launch says gradient_accumulation_steps 3",
        "accelerate launch says dynamo_backend inductor",
        "prodigy learns next to nothing",
        "32 visits and the data has 10",
        "lr_warmup_steps 9 do not end within the 1 steps",
    ):
        assert sum(sentence in line for line in told) == 1, sentence
    # The launcher's compilation would have taken minutes, and does not happen.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["mixed_precision"]) == (1, "fp32")


def test_check_tells_the_same(data_dir, tiny_settings, capsys):
    places = [f"--{name}={value}" for name, value in tiny_settings.items()]
    words = ["--lr_warmup_steps=50", "--num_train_epochs=1", "--lr_scheduler=cosine", "--learning_rate=0"]
    for card in ([], ["--card", "t4"], ["--data"]):
        assert main(["check", *places, *words, *card]) == 0
        text = capsys.readouterr().out
        assert "learning_rate is 0" in text
        assert "lr_warmup_steps 50 do not end within the 3 steps" in text


def test_a_schedule_that_cannot_be_drawn_is_refused_before_anything_is_encoded(
    tiny_settings, tmp_path, capsys
):
    settings = tiny_settings | {"precompute_dir": tmp_path / "cache", "output_dir": tmp_path / "run"}
    settings |= {"lr_warmup_steps": 50, "num_train_epochs": 1, "lr_scheduler": "polynomial"}
    words = [f"--{name}={value}" for name, value in settings.items()]
    for stage in (["check"], ["check", "--data"], ["train"], ["precompute"]):
        assert main([*stage, *words]) == 2
        error = capsys.readouterr().err
        assert "lr_warmup_steps below the 3 steps of the run" in error
        assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["check", "precompute", "compare"])
def test_what_needs_one_process_is_done_by_the_first(monkeypatch, capsys, stage):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([stage, "--train_data_dir", "absent", "--lora_path", "absent"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main([stage, "--train_data_dir", "absent", "--lora_path", "absent"]) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == f"accelerate launch says 2 processes, and {stage} uses one"
    assert "absent" in rest[-1]


def test_an_error_under_the_launcher_is_a_sentence_and_whose_the_rest_is():
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--quiet"]
    done = subprocess.run(
        [*command, "-m", "lora_utils", "train", "--network_dim", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert lines[-2:] == ["ConfigError: there is no setting 'network_dim'; here it is called rank", AFTERWORD]
    assert "Traceback" not in done.stderr
