"""--help shows what a stage uses, docs/settings.md what each setting takes."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from lora_utils import stages
from lora_utils.cli import STAGES, main
from lora_utils.config.reference import settings_of, values_of
from lora_utils.config.schema import RunConfig, all_settings
from lora_utils.storage.log import WEIGHTS_NAME
from tests.conftest import ROOT

ASKED = {"check": ("data", "train", "checkpoint", "compare"), "precompute": ("lora", "train", "checkpoint")}
"""Sections that check doubts, and by which precompute knows the run of a folder; nothing of what they do
depends on them."""
SOMETIMES = {
    # only for a dataset of tables, or a base on the Hub
    *("dataset_config_name", "dataset_split", "image_column", "caption_column"),
    # only where another setting asks for it
    *("run_name", "num_train_epochs", "logit_mean", "logit_std", "max_skipped_steps", "resume_force"),
    "torch_compile",
}


def recorded(config, read):
    """A config that notes which settings are read."""

    def section(name):
        whole = getattr(config, name)
        shape = type(whole)

        class Recorded(shape):
            def __getattribute__(self, leaf):
                if leaf in shape.model_fields:
                    read.add(leaf)
                return super().__getattribute__(leaf)

        return Recorded.model_construct(**whole.__dict__)

    return RunConfig.model_construct(**{name: section(name) for name in RunConfig.model_fields})


@pytest.fixture(scope="module")
def reads(data_dir, tmp_path_factory, tiny_settings):
    """What each stage reads of a run on the tiny SDXL."""
    from lora_utils.config.loading import load_config

    folder = tmp_path_factory.mktemp("runs")
    settings = (
        tiny_settings
        | {"random_crop": True, "enable_bucket": True, "min_bucket_reso": 32, "shuffle_caption": True}
        | {"use_ema": True, "num_inference_steps": 1, "validation_split": 0.2, "max_train_steps": 1}
        # What is kept already is not encoded, nor counted.
        | {"precompute_dir": None, "cache_dir": folder / "counted"}
    )
    runs = {
        "check": lambda config: (stages.check(config), stages.check_data(config)),
        "precompute": stages.precompute,
        "train": lambda config: list(stages.train(config)),
        "compare": stages.compare,
    }
    noted = {}
    for stage, run in runs.items():
        noted[stage] = set()
        if stage == "compare":  # alone: beside its run, the run's settings would be read in place of these
            shutil.copy(folder / "train" / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        lora = {"lora_path": folder / WEIGHTS_NAME}
        config = load_config(None, settings | lora | {"output_dir": folder / stage})
        run(recorded(config, noted[stage]))
    return noted


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_that_a_stage_reads_is_in_its_help(reads, stage):
    assert len(reads[stage]) > 15
    assert reads[stage] - set(settings_of(stage)) <= settings_of_sections(*ASKED.get(stage, ()))


def settings_of_sections(*sections):
    return {leaf for leaf, (section, _) in all_settings().items() if section in sections}


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_in_a_stages_help_is_read_by_it(reads, stage):
    unread = set(settings_of(stage)) - reads[stage] - SOMETIMES
    assert unread == set()


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_shows_its_settings_and_no_others(capsys, stage):
    for flags in (["--help"], ["-h"]):
        with pytest.raises(SystemExit) as stop:
            main([stage, *flags])
        assert stop.value.code == 0
        assert shown(capsys.readouterr().out) == set(settings_of(stage))
    for words in (["--help-all"], [stage, "--help-all"], ["--help"]):
        with pytest.raises(SystemExit):
            main(words)
        assert shown(capsys.readouterr().out) == all_settings().keys()


def shown(text):
    words = {word.removeprefix("--") for word in text.split() if word.startswith("--")}
    return words & all_settings().keys()


def test_help_loads_nothing_large():
    code = (
        "import sys\nfrom lora_utils.cli import main\n"
        "try: main(['train', '--help-all'])\nexcept SystemExit: pass\n"
        "print(not {'torch', 'numpy', 'PIL', 'huggingface_hub', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_settings_page_is_what_the_tool_makes_of_the_schema():
    spec = importlib.util.spec_from_file_location("settings", ROOT / "tools" / "settings.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.page() == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("leaf", "values"),
    [
        ("mixed_precision", "auto, fp32, fp16, bf16"),
        ("gradient_checkpointing", "auto, none, full"),
        ("max_token_length", "77, 150, 225"),
        ("use_dora", "true or false"),
        ("output_dir", "path"),
        ("trigger_word", "text"),
        ("train_data_dir", "one or more: path"),
        ("caption_dropout_rate", "number, at least 0, below 1"),
        ("min_bucket_reso", "whole number, at least 32, at most 4096, a multiple of 8"),
        ("snr_gamma", "number, above 0"),
        ("checkpoints_total_limit", "whole number, at least 2"),
    ],
)
def test_choices_and_ranges_are_the_schemas(leaf, values):
    assert values_of(all_settings()[leaf][1]) == values


@pytest.mark.parametrize("leaf", all_settings())
def test_every_setting_says_what_it_takes_and_its_default_is_that(leaf):
    field = all_settings()[leaf][1]
    values = values_of(field)
    assert values
    schema = json.dumps(RunConfig.model_fields[all_settings()[leaf][0]].annotation.model_json_schema())
    assert leaf in schema
    if isinstance(field.default, str) and "," in values:
        assert field.default in values.split(", ")
