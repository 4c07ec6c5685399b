"""Precision and presets by card; cards are told, not owned."""

import pytest
import torch

from lora_utils import notebook
from lora_utils.config.loading import load_config
from lora_utils.memory import machine
from lora_utils.system import device


@pytest.fixture
def card(monkeypatch):
    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_75", "sm_80", "sm_90"])
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    return pretend


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_the_compute_capability_decides_the_precision(card, capability, expected):
    card(capability)
    assert device.compute_capability() == capability
    assert device.choose_precision("auto", capability).name == expected


def test_accelerate_launch_is_heard_where_nothing_else_is_said(card, monkeypatch):
    card((8, 0))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert device.choose_precision("auto", device.compute_capability()).name == "fp16"
    assert device.choose_precision("fp32", device.compute_capability()).name == "fp32"


def test_fp16_without_a_gpu_is_refused(card):
    card(None)
    with pytest.raises(device.MachineError, match="needs a CUDA GPU"):
        device.choose_precision("fp16", device.compute_capability())


def test_auto_takes_t4_on_a_gpu_and_tiny_without(card, monkeypatch):
    monkeypatch.delenv("LORA_PRESET", raising=False)
    card((7, 5))
    assert notebook.choose_preset("auto") == "t4"
    card(None)
    assert notebook.choose_preset("auto") == "tiny"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    with pytest.raises(device.MachineError, match="Change runtime type"):
        notebook.choose_preset("auto")
    assert notebook.choose_preset("tiny") == "tiny"
    monkeypatch.setenv("LORA_PRESET", "ci")
    assert notebook.choose_preset("auto") == "ci"


def test_colabs_torchao_is_reported_with_its_cure(monkeypatch):
    monkeypatch.setattr(machine, "versions", lambda _: {"torchao": "0.10.0"})
    assert "pip uninstall -y torchao" in machine.problems()[0]
    monkeypatch.setattr(machine, "versions", lambda _: {"torchao": "0.18.0"})
    assert machine.problems() == []


def test_the_check_loads_no_dataset():
    from lora_utils.data.dataset import describe_data

    config = load_config(None, {"dataset_name": "nobody/nothing"})
    text = machine.describe(config.model, config.paths, describe_data(config.data, None))
    assert "nobody/nothing; check --data" in text


def test_apples_gpu_is_said_to_be_left_alone(card, monkeypatch):
    card(None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    config = load_config(None, {"dataset_name": "nobody/nothing"})
    assert "computing on the CPU: Apple's GPU (mps) is not used" in machine.describe(
        config.model, config.paths, ""
    )
