"""Weights on their way from files to a device: streamed, quantised, or refused by name."""

import json
import shutil
import sys

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from benchmarks.memory.loading import with_peak
from lora_utils import UserError, stages
from lora_utils.compare import sampling
from lora_utils.config.schema import ModelConfig
from lora_utils.config.training import LoraConfig
from lora_utils.model import lora, vae
from lora_utils.model import text as text_module
from lora_utils.model.base import ModelError, PretrainedSdxl
from lora_utils.model.quantisation import dequantised_weight
from tests.conftest import TINY

CPU = torch.device("cpu")
NF4_WIDEST_GAP = (
    1 - 0.6961928
)  # between the two outermost of its 16 values (Dettmers et al., 2023, appendix E)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path / "base"


def model(folder=TINY, **settings):
    return PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(folder), **settings))


def same(mine, theirs):
    mine = mine.state_dict()
    theirs = theirs.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def quantised(precision, dtype=torch.float32):
    unet = model().load_unet(dtype, CPU, precision)
    return unet, {name: module for name, module in unet.named_modules() if "bit" in type(module).__name__}


def call(unet):
    generator = torch.Generator().manual_seed(0)
    dtype = unet.conv_in.weight.dtype
    latents, text, pooled = (
        torch.randn(*s, generator=generator) for s in ((1, 4, 16, 16), (1, 77, 128), (1, 64))
    )
    added = {"text_embeds": pooled.to(dtype), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    text = text.to(dtype)
    timesteps = torch.tensor([500])
    return unet(latents.to(dtype), timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streamed_weights_are_diffusers_weights_and_frozen(dtype):
    unet = model().load_unet(dtype)
    assert same(unet, UNet2DConditionModel.from_pretrained(TINY, subfolder="unet", torch_dtype=dtype))
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert not unet.training


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_are_read_as_diffusers_writes_them(folder, variant):
    unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="3MB", variant=variant)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    base = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(folder), variant=variant))
    assert same(base.load_unet(torch.float32), unet)


@pytest.mark.parametrize(
    ("part", "file", "load"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", lambda base: base.load_unet(torch.float32)),
        ("vae", "diffusion_pytorch_model.safetensors", lambda base: base.load_vae()),
        ("text_encoder_2", "model.safetensors", lambda base: base.load_text_pipeline(torch.float32)),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, part, file, load):
    whole = load_file(folder / part / file)
    name = sorted(whole)[len(whole) // 2]
    damaged = {
        "lacking": {key: whole[key] for key in whole if key != name},
        "wider": whole | {name: torch.zeros(3, 5)},
    }
    for tensors in damaged.values():
        save_file(tensors, folder / part / file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            load(model(folder))
    (folder / part / file).write_bytes((folder / part / file).read_bytes()[:-100])
    with pytest.raises(ModelError, match="base"):
        load(model(folder))
    (folder / part / file).unlink()
    with pytest.raises(ModelError, match=file.replace(".", r"\.")):
        load(model(folder))


def test_a_shard_that_is_absent_is_named(folder):
    UNet2DConditionModel.from_pretrained(TINY, subfolder="unet").save_pretrained(
        folder / "unet", max_shard_size="3MB"
    )
    shard = sorted((folder / "unet").glob("*-of-*"))[-1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        model(folder).load_unet(torch.float32)


def test_an_index_that_is_damaged_is_an_error(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="base"):
        model(folder).load_unet(torch.float32)


def test_loading_takes_no_host_memory_for_a_device_elsewhere(folder):
    config = UNet2DConditionModel.load_config(TINY, subfolder="unet") | {
        "block_out_channels": (192, 256, 384)
    }
    unet = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(folder / "unet")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size > 100e6
    base = model(folder)
    base.load_unet(torch.float16, torch.device("meta"))
    [loaded], peak = with_peak(lambda: [base.load_unet(torch.float16, torch.device("meta"))])
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    assert peak <= 0.15 * file.stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_weights_are_as_near_as_their_steps_allow(precision, dtype):
    unet, linears = quantised(precision, dtype)
    plain = model().load_unet(torch.float32)
    assert len(linears) > 50
    for name, linear in linears.items():
        weight = plain.get_submodule(name).weight
        matrix = dequantised_weight(linear)
        assert matrix.dtype == dtype
        assert matrix.shape == weight.shape
        if precision == "int8":
            largest = weight.abs().amax(dim=1, keepdim=True)
            gap = 1 / 127
        else:
            largest = weight.view(-1, 64).abs().amax(1).repeat_interleave(64).view(weight.shape)
            gap = NF4_WIDEST_GAP
        rounding = torch.finfo(dtype).eps + (
            2**-10 if precision == "int8" else 0.05
        )  # fp16 first; nf4's scales in 8 bits
        assert ((matrix.float() - weight).abs() <= largest * (gap / 2 + rounding)).all(), name
    others = [
        parameter for name, parameter in unet.named_parameters() if name.rpartition(".")[0] not in linears
    ]
    assert {parameter.dtype for parameter in others} == {dtype}
    assert not any(word in name for name in linears for word in ("conv", "norm", "emb"))


@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.02), ("nf4", 0.1)])
def test_a_quantised_unet_computes_with_its_dequantised_weights(precision, tolerance):
    unet, linears = quantised(precision)
    plain = model().load_unet(torch.float32)
    before = {name: dequantised_weight(linear).clone() for name, linear in linears.items()}
    with torch.no_grad():
        output = call(unet)
        expected = call(plain)
    assert (output - expected).norm() <= tolerance * expected.norm()
    for name, linear in linears.items():
        assert torch.equal(dequantised_weight(linear), before[name])  # a forward pass leaves them
        plain.get_submodule(name).weight.data = before[name]
    with torch.no_grad():
        # LLM.int8() rounds the inputs of its products as well.
        assert (output - call(plain)).norm() <= (1e-2 if precision == "int8" else 1e-5) * expected.norm()


def test_dequantised_weights_are_those_that_bitsandbytes_multiplies_with():
    _, linears = quantised("nf4")
    for linear in list(linears.values())[:5]:
        rows = torch.eye(linear.in_features)
        torch.testing.assert_close(linear(rows), F.linear(rows, dequantised_weight(linear), linear.bias))
    _, linears = quantised("int8")
    plain = model().load_unet(torch.float32)
    for name, linear in list(linears.items())[:5]:
        codes, scales, _ = int8_vectorwise_quant(plain.get_submodule(name).weight.half())
        torch.testing.assert_close(dequantised_weight(linear), int8_vectorwise_dequant(codes, scales))


def test_a_plain_linear_gives_its_own_weight():
    linear = torch.nn.Linear(3, 2)
    assert dequantised_weight(linear) is linear.weight


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_peft_trains_on_a_quantised_base(precision, tmp_path):
    unet, _ = quantised(precision)
    parameters = lora.add_lora(unet, LoraConfig(rank=2, target_modules=["to_q", "to_k", "to_v"]), seed=0)
    assert "peft.tuners.lora.bnb" in {type(module).__module__ for module in unet.modules()}
    call(unet.train()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert lora.save_lora(unet, tmp_path).exists()


def test_int8_rounds_contiguous_inputs_alone(monkeypatch):
    unet, _ = quantised("int8")
    lora.add_lora(unet, LoraConfig(rank=2, target_modules=["attn"]), seed=0)
    given = []

    def watched(inputs, threshold=0.0):
        given.append(inputs)
        return int8_vectorwise_quant(inputs, threshold)

    monkeypatch.setattr(bitsandbytes.functional, "int8_vectorwise_quant", watched)
    with torch.no_grad():
        call(unet.eval())  # in training, a CPU does not round them
    assert len(given) > 50
    assert all(inputs.is_contiguous() for inputs in given)  # CUDA's kernel reads nothing else rightly


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_an_adapter_draws_on_a_quantised_base(precision, tmp_path):
    unet = model().load_unet(torch.float32)
    for parameter in lora.add_lora(unet, LoraConfig(rank=2, target_modules=["to_q", "to_v"]), seed=0):
        parameter.data += 0.05
    pipeline = model().load_unet_pipeline(torch.float32, CPU, precision)
    assert pipeline.vae is pipeline.text_encoder is None
    pipeline.vae_scale_factor = model().vae_scale_factor()
    text = text_module.encode_captions(model().load_text_pipeline(torch.float32), ["a red star"])
    settings = sampling.SamplingSettings(
        64, 64, num_inference_steps=2, guidance_scale=1.0, negative_prompt=None
    )
    plain = sampling.draw_latents(pipeline, text, text, 0, settings)
    lora.load_lora(pipeline, lora.read_lora(pipeline, lora.save_lora(unet, tmp_path)))
    tuned = sampling.draw_latents(pipeline, text, text, 0, settings)
    assert torch.isfinite(tuned).all()
    assert not torch.equal(tuned, plain)


def test_what_cannot_be_quantised_is_refused_with_its_cure(folder, monkeypatch):
    with pytest.raises(ModelError, match="set base_precision to auto"):
        model().load_unet(torch.float32, CPU, "fp16")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes.nn", None)  # as if it were not installed
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            model().load_unet(torch.float32, CPU, "nf4")
    path = folder / "unet" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"load_in_4bit": True}})
    )
    with pytest.raises(ModelError, match="choose the plain model"):
        model(folder).load_unet(torch.float32)


@pytest.mark.parametrize(
    ("card_gib", "size", "encode", "decode"),
    [
        (14.7, (1024, 1024), None, None),
        (14.7, (1536, 1536), None, None),
        (14.7, (2560, 2560), 1024, 1024),
        (5.8, (1024, 1024), None, None),
        (3.9, (1024, 1024), 512, 512),
        (3.9, (512, 512), None, None),
        (5.8, (1536, 1536), 1024, 1024),
    ],
)
def test_the_vae_tiles_only_where_the_card_is_too_small(monkeypatch, card_gib, size, encode, decode):
    monkeypatch.setattr(vae, "_device_gib", lambda: card_gib)
    assert vae.vae_tile(size, torch.float32) == encode
    assert vae.vae_tile(size, torch.float32, vae.DECODE_GIB) == decode


def test_one_rule_plans_the_vae_here_and_on_a_card_that_is_not_here(monkeypatch):
    monkeypatch.setattr(vae, "_device_gib", lambda: 3.9)
    tiled = vae.plan_encoding((1024, 1024), torch.float32, card_gib=3.9)
    assert tiled == vae.VaePlan(torch.float32, 512, vae.vae_batch(512 * 512, torch.float32, 3.9))
    assert vae.plan_encoding((1024, 1024), torch.float32, batch=3).batch == 3
    assert vae.plan_encoding((1024, 1024), torch.float32).tile_px == 512
    whole = vae.plan_encoding((1024, 1024), torch.float32, card_gib=14.7)
    assert whole == vae.VaePlan(torch.float32, None, vae.vae_batch(1024 * 1024, torch.float32, 14.7))
    assert vae.plan_decoding((1024, 1024)) == vae.VaePlan(torch.float32, 512, 1)
    assert vae.encoding_dtype(ModelConfig(vae_precision="fp16")) == torch.float16


def test_records_of_tiled_images_are_kept_apart(make_config, data_dir, monkeypatch):
    config = make_config(train_data_dir=data_dir, precompute_dir=None)
    stages.precompute(config)
    assert stages.precompute(config).encoded_images == 0
    monkeypatch.setattr(vae, "_device_gib", lambda: vae.SPARE_GIB + vae.VAE_GIB + 0.003)
    monkeypatch.setattr(vae, "TILES_PX", (32,))
    assert stages.precompute(config).encoded_images == 10
    monkeypatch.undo()
    assert stages.precompute(config).encoded_images == 0
