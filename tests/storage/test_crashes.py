"""A process, or the power, that ends at any operation on files leaves the old state or the new one."""

import pytest
import torch

from benchmarks.faults import crash_scenarios as scenarios
from benchmarks.faults.crash_scenarios import crash_everywhere, cut_power_everywhere
from benchmarks.faults.operations import without_syncing
from lora_utils.config.schema import ModelConfig
from lora_utils.config.training import LoraConfig
from lora_utils.model import lora
from lora_utils.model.base import PretrainedSdxl
from tests.conftest import TINY

BOTH = {"before", "after"}
NONE, HALF = (), (0.5,)  # everything torn in all ways in `python -m benchmarks faults`


@pytest.fixture(autouse=True)
def quick_disk():
    with without_syncing():
        yield


@pytest.fixture(scope="module")
def adapted_unet():
    unet = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY)), None).load_unet(torch.float32)
    lora.add_lora(unet, LoraConfig(rank=1), seed=0)
    return unet


def assert_covered(found, outcomes, **expected):
    assert expected.items() <= found.items(), found
    assert outcomes.keys() >= BOTH


def test_a_crash_at_any_operation_of_a_checkpoint_loses_neither_the_old_nor_the_new_one(tmp_path):
    found, outcomes = crash_everywhere(scenarios.checkpoints(), tmp_path, HALF)
    assert_covered(found, outcomes, create=6, write=6, fsync=8, rename=2, rmdir=1)
    assert outcomes["before, torn"] > 10
    assert sum(outcomes.values()) > 40


def test_a_crash_while_a_damaged_checkpoint_is_replaced_loses_nothing(tmp_path):
    found, outcomes = crash_everywhere(scenarios.damaged_checkpoints(), tmp_path, NONE)
    assert_covered(found, outcomes, rename=2)


def test_a_crash_at_any_operation_of_the_cache_loses_no_record(tmp_path):
    found, outcomes = crash_everywhere(scenarios.cache_packs(), tmp_path, NONE)
    assert_covered(found, outcomes, create=3, rename=3)


def test_a_crash_at_any_operation_of_the_log_leaves_files_that_can_be_read(tmp_path):
    found, outcomes = crash_everywhere(scenarios.run_log(), tmp_path, NONE)
    assert_covered(found, outcomes, rename=6)


def test_a_crash_at_any_operation_of_the_export_leaves_the_old_adapter_or_the_new_one(adapted_unet, tmp_path):
    found, outcomes = crash_everywhere(scenarios.export(adapted_unet), tmp_path, NONE)
    assert_covered(found, outcomes, create=1, fsync=2, rename=1)


def test_a_power_cut_at_any_operation_of_a_checkpoint_loses_nothing_that_was_safe(tmp_path):
    outcomes = cut_power_everywhere(scenarios.checkpoints(), tmp_path)
    assert outcomes.keys() == BOTH
    assert sum(outcomes.values()) > 200
