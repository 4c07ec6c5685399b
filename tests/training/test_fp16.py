"""fp16 with a scaled loss, on the CPU."""

import json

import pytest
import torch
from accelerate import Accelerator

from lora_utils import stages
from lora_utils.model.base import PretrainedSdxl
from lora_utils.system.device import Precision
from lora_utils.training import loop
from lora_utils.training.run import prepare


@pytest.fixture
def prepared(make_config):
    config = make_config(max_train_steps=2, train_batch_size=1, rank=4)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    base = PretrainedSdxl(config.model)
    precision = Precision("fp16", "the test asks")
    return config, prepare(config, base, stages.precompute(config), accelerator, precision)


def test_fp16_trains_with_fp32_masters_and_the_losses_of_fp32(prepared, make_config, tmp_path):
    config, run = prepared
    losses = [report.loss for report in loop.train(config, run)]
    trained = [parameter for parameter in run.planned.unet.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    plain = make_config(max_train_steps=2, train_batch_size=1, rank=4, output_dir=tmp_path / "fp32")
    assert losses == pytest.approx([report.loss for report in stages.train(plain)], rel=0.01)
    assert json.loads((config.paths.output_dir / "summary.json").read_text())["mixed_precision"] == "fp16"


def test_an_overflow_skips_the_step_and_says_so(prepared):
    config, run = prepared
    named = dict(run.planned.unet.named_parameters())
    parameter = next(named[name] for name in named if "lora_B" in name)
    hook = parameter.register_hook(lambda gradient: gradient * torch.inf)
    reports = loop.train(config, run)
    first = next(reports)
    hook.remove()
    assert first.grad_norm is None
    assert not parameter.any()
    assert next(reports).grad_norm > 0
    assert parameter.any()
