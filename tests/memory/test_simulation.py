"""What a simulation counts, against what torch really allocates and multiplies."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import accuracy
from lora_utils.memory import simulation
from lora_utils.memory.allocator import least_limit, replay
from lora_utils.memory.simulation import Simulation, is_supported, on_meta
from tests.conftest import TINY

MIB = 2**20


@pytest.fixture(scope="module")
def tiny_unet_config():
    return json.loads((TINY / "unet" / "config.json").read_text())


@pytest.mark.parametrize(
    ("way", "recompute", "percent"),
    [("lean", "none", 0.5), ("peft", "none", 0.5), ("lean", "auto", 5), ("lean", "full", 5)],
)
def test_the_peak_is_what_the_real_allocator_takes(tiny_unet_config, way, recompute, percent):
    (row,) = accuracy.measure(tiny_unet_config, [(way, recompute, 4, 32)])
    assert abs(row["error_percent"]) <= percent


def test_operations_are_those_that_torch_counts(tiny_unet_config):
    unet = UNet2DConditionModel(**tiny_unet_config)
    with FlopCounterMode(display=False) as counter:
        accuracy._forward_and_backward(unet, 2, 16, torch.device("cpu"))
    with on_meta(torch.float32):
        unet = UNet2DConditionModel(**tiny_unet_config)
    with Simulation() as simulated:
        accuracy._forward_and_backward(unet, 2, 16, torch.device("meta"))
    counted = {str(name): amount for name, amount in counter.get_flop_counts()["Global"].items()}
    products = sum(amount for name, amount in counted.items() if "attention" not in name)
    work = simulated.work()
    assert work.flops["gemm"] + work.flops["conv"] == products


def test_a_storage_lives_until_its_last_view_is_gone():
    with Simulation() as simulated:
        whole = torch.empty(MIB, dtype=torch.uint8, device="meta")
        view = whole[: MIB // 2]
        del whole
        assert simulated.live_bytes == MIB
        del view
        assert simulated.live_bytes == 0
    assert simulated.peak_bytes == MIB


def test_views_and_empty_tensors_are_no_kernels():
    with Simulation() as simulated:
        square = torch.empty(8, 8, device="meta")
        square.t().reshape(4, 16)[:2].unsqueeze(0).detach()
        assert simulated.operators == 1  # the copy that reshape needs
        torch.mm(square, square).add_(1)
        assert simulated.operators == 3


def test_attention_keeps_what_the_fused_kernel_keeps():
    query, key, value = (torch.empty(1, 4, 1024, 64, device="meta", requires_grad=True) for _ in range(3))
    with Simulation() as simulated:
        out = F.scaled_dot_product_attention(query, key, value)
        assert out.numel() * 4 <= simulated.live_bytes <= 1.1 * out.numel() * 4  # and no 1024 x 1024
        out.sum().backward()
    assert simulated.work().flops["attention"] == 4 * 3.5 * 4 * 1024 * 1024 * 64
    assert F.scaled_dot_product_attention is not simulation._fused_attention


def test_a_unit_is_what_a_module_keeps_without_its_output_and_what_it_was_given():
    block = (
        nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).requires_grad_(False).to("meta")
    )
    with Simulation() as simulated:
        simulated.hold(block.parameters())
        simulated.watch("block", block)
        x = torch.empty(64, 256, device="meta", requires_grad=True)
        y = block(x * 2)
        unit = simulated.units()["block"]
        y.sum().backward()
    kept_by_gelu = 4 * 64 * 1024
    given = 4 * 64 * 256
    assert unit.freed_bytes == kept_by_gelu - given
    assert unit.work.flops["gemm"] == 2 * 64 * 256 * 1024  # nobody wants the second product again


def test_the_allocator_splits_and_joins_as_cudas_does():
    trace = [
        (1, 30 * MIB),
        (1, -30 * MIB),
        (2, 12 * MIB),
        (3, 12 * MIB),
        (2, -12 * MIB),
        (3, -12 * MIB),
        (4, 30 * MIB),
    ]
    assert replay(trace) == 30 * MIB
    assert replay([(1, 512)]) == 2 * MIB
    assert replay([(1, 3 * MIB)]) == 20 * MIB


def test_a_full_card_gets_its_empty_segments_back():
    trace = [(1, 40 * MIB), (1, -40 * MIB), (2, 60 * MIB)]
    assert replay(trace) == 100 * MIB
    assert least_limit(trace, 60 * MIB, 100 * MIB) <= 68 * MIB


def test_this_torch_can_simulate():
    assert is_supported()


def test_a_torch_without_its_flash_kernel_cannot_simulate(monkeypatch):
    monkeypatch.setattr(simulation, "FLASH", "a_kernel_that_was_renamed")
    assert not is_supported()
