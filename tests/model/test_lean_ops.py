"""The autograd nodes against autograd itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_utils.model import lean_ops

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, **EXACT)
    towards = torch.randn_like(ours)
    got = torch.autograd.grad(ours, inputs, towards, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(theirs, inputs, towards), **EXACT)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("scale", [1, 0.5])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_base_and_lora_in_one_node_are_base_plus_lora(count, dropout, scale):
    x = random(2, 5, 8).requires_grad_()
    weight = random(6 * count, 8)
    bias = random(6 * count)
    downs = [random(3, 8).requires_grad_() for _ in range(count)]
    ups = [random(6, 3).requires_grad_() for _ in range(count)]
    dropped = F.dropout(x, 0.4) if dropout else None
    up = torch.stack([up.detach() for up in ups])
    projection = lean_ops.Projection(
        lambda: weight, bias, torch.cat([down.detach() for down in downs]), up, scale
    )
    ours = lean_ops.lora_linear(x, dropped, projection, [*downs, *ups])
    seen = x if dropped is None else dropped
    updates = [scale * seen @ down.T @ up.T for down, up in zip(downs, ups, strict=True)]
    theirs = F.linear(x, weight, bias) + torch.cat(updates, dim=-1)
    assert_same(ours, theirs, [x, *downs, *ups])


def test_a_frozen_linear_layer_is_a_linear_layer():
    x = random(2, 5, 8).requires_grad_()
    weight = random(6, 8)
    bias = random(6)
    assert_same(lean_ops.frozen_linear(x, lambda: weight, bias), F.linear(x, weight, bias), [x])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}, {"dilation": 2}])
def test_a_frozen_convolution_is_a_convolution(layout, options):
    conv = nn.Conv2d(8, 6, 3, padding=1, **options).double().requires_grad_(False)
    x = random(2, 8, 6, 6).to(memory_format=layout).requires_grad_()
    assert_same(lean_ops.frozen_conv2d(x, conv), conv(x), [x])


def test_geglu_is_its_formula():
    hidden = random(2, 5, 8).requires_grad_()
    value, gate = hidden.chunk(2, dim=-1)
    assert_same(lean_ops.geglu(hidden), value * F.gelu(gate), [hidden])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_and_silu_in_one_node_are_both_in_turn(layout):
    norm = nn.GroupNorm(4, 8, eps=1e-3).double().requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    x = random(2, 8, 4, 4).to(memory_format=layout).requires_grad_()
    assert_same(lean_ops.group_norm_silu(x, norm), F.silu(norm(x)), [x])


def test_what_is_not_wanted_gets_no_gradient():
    """The text's projections: their input is cached, and nothing goes back into it."""
    weight = random(6, 8)
    down = random(3, 8).requires_grad_()
    up = random(6, 3).requires_grad_()
    projection = lean_ops.Projection(lambda: weight, None, down.detach(), up.detach()[None], 1.0)
    text = random(2, 5, 8)
    lean_ops.lora_linear(text, None, projection, [down, up]).sum().backward()
    assert text.grad is None
    assert up.grad is not None
