"""Words of a command line, as ``read_flags`` and the whole command understand them."""

import pytest

from lora_utils.cli import main, parse
from lora_utils.config.flags import read_flags
from lora_utils.config.loading import ConfigError, all_settings

LISTS = ["prompt", "seeds", "train_data_dir", "num_repeats", "target_modules"]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--rank 8", {"rank": "8"}),
        ("--rank=8", {"rank": "8"}),
        ("--rank 8 --rank=8", {"rank": "8"}),
        ("--learning-rate 1e-4", {"learning_rate": "1e-4"}),
        ("--learning_rate -1e-4", {"learning_rate": "-1e-4"}),
        ("--logit_mean -.5 --logit_std=1", {"logit_mean": "-.5", "logit_std": "1"}),
        ("--adapter_scale -inf", {"adapter_scale": "-inf"}),
        ("--seeds -1 2", {"seeds": ["-1", "2"]}),
        ("--prompt a b --prompt c", {"prompt": ["a", "b", "c"]}),
        ("--prompt=a --prompt=a", {"prompt": ["a", "a"]}),
        ("--prompt a=b -c", {"prompt": ["a=b", "-c"]}),
        ("--prompt=--rank", {"prompt": "--rank"}),
        ("--resolution 1280 720", {"resolution": ["1280", "720"]}),
        ("--use_dora", {"use_dora": "true"}),
        ("--use_dora false --use_ema", {"use_dora": "false", "use_ema": "true"}),
        ("--gradient_checkpointing --rank 2", {"gradient_checkpointing": "true", "rank": "2"}),
        ("--rank=", {"rank": ""}),
    ],
)
def test_words_become_settings(words, values):
    assert read_flags(["train", *words.split(), "--version"]) == (values, ["train", "--version"])


@pytest.mark.parametrize("leaf", LISTS)
def test_every_list_adds_up(leaf):
    assert read_flags([f"--{leaf}", "1", "2", f"--{leaf}=3", f"--{leaf}", "4"])[0] == {
        leaf: ["1", "2", "3", "4"]
    }


def test_the_lists_are_known():
    lists = {leaf for leaf, (_, field) in all_settings().items() if "list[" in str(field.annotation)}
    assert set(LISTS) <= lists
    assert len(lists) < 12
    for leaf in all_settings().keys() - lists:
        with pytest.raises(ConfigError, match=f"--{leaf} is there twice, as 1 and 2"):
            read_flags([f"--{leaf}=1", f"--{leaf}=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank"], "--rank has no value"),
        (["--learning_rate", "--rank", "8"], "--learning_rate has no value"),
        (["--prompt", "--rank=8"], "--prompt has no value"),
        (["--rank="], "rank: must have a value"),
        (["--rank", ""], "rank: must have a value"),
        (["--rank", "8", "--rank", "16"], "--rank is there twice, as 8 and 16"),
        (["--resolution=64", "--resolution", "128"], "--resolution is there twice"),
        (["--use_dora", "--use_dora=false"], "--use_dora is there twice"),
        (["--learning_rate", "-1e-4"], "learning_rate: should be greater than or equal to 0, not '-1e-4'"),
        (["--learning_rate=-.5"], "learning_rate: should be greater than or equal to 0"),
        (["--rank", "-1"], "rank: should be greater than 0"),
        (["--learning_rate", "-inf"], "learning_rate"),
        (["-rank", "8"], "write --rank"),
        (["\u2013rank", "8"], "write --rank"),
        (["\u2014learning-rate=1e-4"], "write --learning_rate"),
        (["--prompt", "a", "\u2013seeds", "3"], "write --seeds"),
        (["--use_dora", "maybe"], "use_dora"),
        (["--max_grad_norm", "0"], "1e9 never scales down"),
        (["--lora_alpha", "0"], "same as rank"),
        (["--mixed_precision", "no"], "full precision is fp32"),
        (["--mixed_precision", "float16"], "half precision is fp16"),
        (["--lr_warmup_steps", "0.1"], "counts steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_goes_wrong_says_how(words, message, capsys):
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_the_config_is_named_once(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "ci", "--config=t4"])
    assert "--config is there twice" in capsys.readouterr().err


def test_flags_before_the_stage_are_understood():
    assert parse(["--rank", "8", "train", "--config", "ci"]).config.lora.rank == 8
    assert parse(["--config", "ci", "--prompt", "a", "--rank=4", "compare"]).config.compare.prompt == ["a"]
