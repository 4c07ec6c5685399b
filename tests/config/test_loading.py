import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_utils.config.loading import ConfigError, all_settings, dump_config, load_config
from lora_utils.config.schema import RunConfig
from tests.conftest import ROOT
from tools.settings import page


def test_leaf_names_are_unique_over_the_sections():
    leaves = [leaf for field in RunConfig.model_fields.values() for leaf in field.annotation.model_fields]
    assert len(leaves) > 30
    assert len(leaves) == len(set(leaves)) == len(all_settings())
    assert not set(leaves) & set(RunConfig.model_fields)


def test_every_setting_explains_itself():
    assert all(field.description for _, field in all_settings().values())


def test_file_then_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lora:\n  rank: 8\ntrain:\n  learning_rate: 1e-5\nseed: 7\n")
    config = load_config(file, {"seed": "9"})
    assert (config.lora.rank, config.train.learning_rate, config.train.seed) == (8, 1e-5, 9)


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(None, {"prompt": ["ü, a", "b"], "train_data_dir": "x y", "snr_gamma": 5})
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"lerning_rate": 1}, ["'lerning_rate'", "did you mean 'learning_rate'"]),
        ({"rank": 0}, ["rank", "greater than 0", "0"]),
        ({"rank": 0, "learning_rate": "fast"}, ["rank", "learning_rate"]),
        ({"mixed_precision": False}, ["mixed_precision", "fp32"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"lora": {"seed": 1}}, ["'seed'", "'train:'"]),
        ({"lora": 3}, ["'lora' is a section"]),
        ({"alpha_background": "whitish"}, ["alpha_background", "whitish"]),
        ({"resolution": "wide"}, ["resolution", "1280x720"]),
        ({"train_data_dir": ["a", "b"], "num_repeats": [1, 2, 3]}, ["num_repeats", "one for each"]),
        ({"enable_bucket": True, "resolution": 64}, ["min_bucket_reso"]),
        ({"mask_data_dir": "m", "alpha_mask": True}, ["exclude each other"]),
        ({"resolution": 1001}, ["resolution", "multiple of 8"]),
    ],
)
def test_what_is_wrong_is_said_by_name(overrides, words):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("resolution", [63, "63", "63x63", 100_000])
def test_both_sides_of_a_square_are_one_mistake(resolution):
    with pytest.raises(ConfigError) as error:
        load_config(None, {"resolution": resolution})
    assert str(error.value).count("resolution: ") == 1


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "rank: !!python/object/apply:os.system ['true']\n"])
def test_a_broken_file_is_an_error_that_names_it(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(file)


def test_nothing_writes_to_a_config():
    with pytest.raises(ValueError, match="frozen"):
        load_config().lora.rank = 3


def test_every_ready_made_config_loads():
    files = sorted((ROOT / "lora_utils" / "presets").glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        load_config(file)
        assert file.read_text().startswith("#"), f"{file} opens without the command that runs it"


def test_the_settings_page_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page()


def test_help_loads_no_torch_and_names_every_setting():
    probe = "import sys; from lora_utils.cli import main\n"
    probe += "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 20  # the promise is 1 s; benchmarks measure, this only catches torch
    assert all(f"--{leaf}" in done.stdout for leaf in all_settings())


def test_a_source_of_data_replaces_the_one_of_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train_data_dir: pictures\nresolution: 64\n")
    assert load_config(file, {"dataset_name": "user/name"}).data.train_data_dir is None
    assert load_config(file, {"dataset_name": "mine.py"}).data.train_data_dir == [Path("pictures")]
    file.write_text("dataset_name: user/name\n")
    assert load_config(file, {"train_data_dir": "mine"}).data.dataset_name is None
    file.write_text("dataset_name: mine.py\n")
    assert load_config(file, {"train_data_dir": "mine"}).data.dataset_name == "mine.py"


def test_every_setting_takes_its_default_as_text():
    """As the command line gives it."""
    for leaf, (_, field) in all_settings().items():
        if field.default is not None and not isinstance(field.default, Path):
            default = load_config().model_dump(mode="json")[all_settings()[leaf][0]][leaf]
            text = [str(one) for one in default] if isinstance(default, list) else str(default).lower()
            assert load_config(None, {leaf: text}) == load_config()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_8bit_adam": True, "optimizer": "prodigy"}, "leave one out"),
        ({"snr_gamma": 5, "debiased_estimation_loss": True}, "leave one out"),
        ({"min_timestep": 500, "max_timestep": 400}, "must be above min_timestep 500"),
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "set lr_scheduler to constant"),
        ({"optimizer": "schedulefree", "use_ema": True}, "leave out use_ema"),
        ({"optimizer": "schedulefree", "adam_beta1": 0}, "adam_beta1 above 0"),
        ({"optimizer": "prodigy", "loraplus_lr_ratio": 16}, "no loraplus_lr_ratio"),
        ({"optimizer": "prodigy", "learning_rate": 0}, "learning_rate 1"),
        ({"torch_compile": True}, "lean_step to false"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_exclude_each_other_are_refused_with_the_way_out(settings, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, settings)
