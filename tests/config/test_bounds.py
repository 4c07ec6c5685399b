"""Numbers that would fail late are refused in the config; those that only look odd are taken."""

import json
from typing import get_args

import pytest
import torch

from lora_utils.config.flags import read_flags
from lora_utils.config.loading import ConfigError, all_settings, dump_config, load_config
from lora_utils.config.schema import CompareConfig
from lora_utils.config.section import Section
from lora_utils.config.training import LoraConfig


def parts(annotation):
    return [annotation, *(inner for part in get_args(annotation) for inner in parts(part))]


def of_type(wanted):
    return [leaf for leaf, (_, field) in all_settings().items() if wanted in parts(field.annotation)]


LISTS = [leaf for leaf, (_, field) in all_settings().items() if "list[" in str(field.annotation)]


def refusal(leaf, value):
    with pytest.raises(ConfigError) as error:
        load_config(None, {leaf: value})
    return str(error.value)


def test_numbers_and_lists_are_known():
    assert len(of_type(float)) > 20
    assert len(of_type(int)) > 25
    assert len(LISTS) >= 5
    assert not Section.model_config["allow_inf_nan"]


@pytest.mark.parametrize("leaf", of_type(float))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), "nan", "-inf", "1e999"])
def test_no_number_is_infinite_or_none_at_all(leaf, value):
    assert leaf in refusal(leaf, value)


@pytest.mark.parametrize("leaf", of_type(int))
@pytest.mark.parametrize("value", [2**63, 2**64, 10**30, "9" * 400, 1e300])
def test_no_count_or_seed_is_beyond_what_libraries_count_with(leaf, value):
    assert leaf in refusal(leaf, value)


@pytest.mark.parametrize("leaf", [leaf for leaf in of_type(int) if leaf not in ("seed", "seeds")])
def test_counts_end_at_32_bits(leaf):
    assert leaf in refusal(leaf, 2**31)


@pytest.mark.parametrize("leaf", LISTS)
def test_an_empty_list_is_refused_or_not_given(leaf, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{leaf}: []\n")
    if type(None) in get_args(all_settings()[leaf][1].annotation):
        assert load_config(file) == load_config(None, {leaf: []} | {"run_name": "run"})
        return
    for load in (lambda: load_config(file), lambda: load_config(None, {leaf: []})):
        with pytest.raises(ConfigError, match=f"^{leaf}: must have a value"):
            load()


@pytest.mark.parametrize("leaf", ["seed", "seeds"])
@pytest.mark.parametrize(("value", "words"), [(-1, "random"), (-(2**63), "random"), (2**63, r"below 2\^63")])
def test_seeds_that_mean_something_else_elsewhere_are_refused(leaf, value, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, read_flags([f"--{leaf}", str(value)])[0])
    with pytest.raises(ConfigError, match=words):
        load_config(None, {leaf: [0, value] if leaf == "seeds" else value})


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_seeds_that_are_taken_are_torchs_own(seed):
    config = load_config(None, {"seed": seed, "seeds": [seed]})
    assert torch.Generator().manual_seed(config.compare.seeds[0]).initial_seed() == config.train.seed == seed


@pytest.mark.parametrize("scale", [-1, -2.5, 0, "-0.5", 3])
def test_a_lora_may_be_drawn_the_other_way(scale):
    given, _ = read_flags(["--adapter_scale", str(scale)])
    assert load_config(None, given).compare.adapter_scale == float(scale)
    assert CompareConfig(adapter_scale=scale).adapter_scale == float(scale)


@pytest.mark.parametrize("alpha", [0.5, "0.5", 1, 16, 1e-3, 12.75])
def test_alpha_may_be_a_fraction(alpha, tmp_path):
    config = load_config(None, {"lora_alpha": alpha})
    assert config.lora.lora_alpha == float(alpha)
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    # What an earlier version wrote down as a whole number is still the same.
    assert json.loads(json.dumps(LoraConfig(lora_alpha=16).model_dump()))["lora_alpha"] == 16


@pytest.mark.parametrize("value", [0, -1, -0.5])
def test_alpha_of_nothing_is_refused(value):
    assert "lora_alpha" in refusal("lora_alpha", value)


@pytest.mark.parametrize("names", ["to_q,", ["attn", ""], [" "]])
def test_no_layer_is_called_nothing(names):
    if names == "to_q,":
        assert load_config(None, {"target_modules": names}).lora.target_modules == ["to_q,"]
        return
    assert "target_modules: holds an empty name" in refusal("target_modules", names)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("rank", 5000),
        ("num_inference_steps", 1001),
        ("dataloader_num_workers", 10**6),
        ("crop_variants", 10**6),
        ("caption_variants", 10**6),
        ("num_repeats", [1, 0]),
        ("num_repeats", -3),
        ("caption_dropout_rate", 1.0),
    ],
)
def test_what_could_only_fail_later_is_refused(leaf, value):
    assert leaf in refusal(leaf, value)


@pytest.mark.parametrize("name", ["lora", "уни_日本_é_x²", "a.b-c", "e\u0301t\u00e9", "٣"])
def test_a_run_may_be_called_what_a_folder_of_data_is(name, tmp_path):
    folder = tmp_path / name
    config = load_config(None, {"train_data_dir": folder})
    assert load_config(None, {"run_name": config.paths.run_name}) is not None


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "-x", "a b", "a\\b", "a:b"])
def test_a_run_is_not_called_what_is_no_folder(name):
    assert "run_name" in refusal("run_name", name)
