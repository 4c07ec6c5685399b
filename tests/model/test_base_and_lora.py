"""The base model's parts, the encoders and the adapter, against diffusers' own."""

import shutil

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_utils.config.schema import ModelConfig
from lora_utils.config.training import LoraConfig
from lora_utils.model import lora
from lora_utils.model import text as text_module
from lora_utils.model.base import ModelError, PretrainedSdxl
from lora_utils.model.vae import decode_latents, encode_images
from tests.conftest import TINY


@pytest.fixture
def base():
    return PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY)))


@pytest.fixture
def unet(base):
    return base.load_unet(torch.float32)


def call(unet, seed=0):
    generator = torch.Generator().manual_seed(seed)
    added = {
        "text_embeds": torch.randn(1, 64, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    with torch.no_grad():
        return unet(
            torch.randn(1, 4, 16, 16, generator=generator),
            torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 77, 128, generator=generator),
            added_cond_kwargs=added,
        ).sample


def test_a_folder_copied_elsewhere_is_the_same_model(base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    other = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(copy)))
    assert other.vae_identity() == base.vae_identity()
    assert other.text_identity() == base.text_identity()
    weights = load_file(copy / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: tensor + 0.5 for name, tensor in weights.items()},
        copy / "vae" / "diffusion_pytorch_model.safetensors",
    )
    assert other.vae_identity() != base.vae_identity()
    assert other.text_identity() == base.text_identity()


def test_the_noise_schedule_is_the_base_models(base):
    schedule = base.load_noise_schedule()
    theirs = DDPMScheduler.from_pretrained(TINY, subfolder="scheduler")
    assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod)
    assert schedule.prediction_type == "epsilon"
    assert schedule.scaling_factor == base.load_vae().config.scaling_factor


@pytest.mark.parametrize("name", ["./absent", "/absent", "not a model"])
def test_an_absent_base_model_is_named(name):
    with pytest.raises(ModelError, match=r"absent|not a model"):
        PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=name)).load_unet(torch.float32)


def test_weights_that_are_cut_off_are_an_error(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="copy"):
        PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(copy))).load_unet(torch.float32)


def test_moments_are_the_vaes_and_decoding_is_the_pipelines(base, tiny_pipeline):
    vae = base.load_vae()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    moments = encode_images(vae, pixels)
    with torch.no_grad():
        posterior = tiny_pipeline.vae.encode(pixels).latent_dist
        decoded = tiny_pipeline.vae.decode(posterior.mean / vae.config.scaling_factor).sample
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.parameters.chunk(2, dim=1)[1]], dim=1))
    assert torch.equal(decode_latents(vae, posterior.mean), decoded)


def test_captions_are_embedded_as_the_pipeline_embeds_them(base, tiny_pipeline):
    captions = ["a red star on a blue background", "", "Ünïcode 🦊 " * 60]
    texts = text_module.encode_captions(base.load_text_pipeline(torch.float32), captions)
    theirs = tiny_pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    assert texts.prompt_embeds.shape == (3, 77, 128)
    assert torch.equal(texts.prompt_embeds, theirs[0])
    assert torch.equal(texts.pooled_prompt_embeds, theirs[2])


@pytest.mark.parametrize("negative", [None, "", "blurry"])
def test_the_negative_side_is_the_pipelines(base, tiny_pipeline, negative):
    mine = text_module.encode_negative(base.load_text_pipeline(torch.float32), negative)
    theirs = tiny_pipeline.encode_prompt("x", negative_prompt=negative)
    assert torch.equal(mine.prompt_embeds, theirs[1])
    assert torch.equal(mine.pooled_prompt_embeds, theirs[3])


def test_a_new_adapter_changes_nothing_and_is_a_function_of_the_seed(unet, base):
    before = call(unet)
    parameters = lora.add_lora(unet, LoraConfig(rank=4), seed=1)
    assert torch.equal(call(unet), before)
    assert parameters
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    torch.manual_seed(99)
    again = lora.add_lora(base.load_unet(torch.float32), LoraConfig(rank=4), seed=1)
    other = lora.add_lora(base.load_unet(torch.float32), LoraConfig(rank=4), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters, other, strict=True))


def test_the_adapter_is_fp32_on_an_fp16_base(base):
    unet = base.load_unet(torch.float16)
    assert {p.dtype for p in lora.add_lora(unet, LoraConfig(rank=4), seed=0)} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.float16}


@pytest.mark.parametrize("alpha", [None, 2, 16])
def test_a_saved_adapter_means_the_same_to_every_reader(unet, fresh_pipeline, tmp_path, alpha):
    for parameter in lora.add_lora(unet, LoraConfig(rank=4, lora_alpha=alpha), seed=1):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05
    file = lora.save_lora(unet, tmp_path)
    fresh_pipeline.load_lora_weights(tmp_path, weight_name=lora.WEIGHTS_NAME)
    torch.testing.assert_close(call(fresh_pipeline.unet), call(unet), rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        call(fresh_pipeline.unet),
        call(PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY))).load_unet(torch.float32)),
    )
    assert len(load_file(file)) == len(get_peft_model_state_dict(unet))
    assert [path.name for path in tmp_path.iterdir()] == [lora.WEIGHTS_NAME]


def test_an_adapter_that_diffusers_saved_with_metadata_keeps_its_strength(
    unet, base, fresh_pipeline, tmp_path
):
    for parameter in lora.add_lora(unet, LoraConfig(rank=4, lora_alpha=2), seed=1):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    pipeline = base.load_unet_pipeline(torch.float32)
    lora.load_lora(pipeline, lora.read_lora(pipeline, tmp_path / lora.WEIGHTS_NAME))
    torch.testing.assert_close(call(pipeline.unet), call(unet), rtol=1e-4, atol=1e-5)
    fresh_pipeline.load_lora_weights(tmp_path, weight_name=lora.WEIGHTS_NAME)
    assert torch.equal(call(pipeline.unet), call(fresh_pipeline.unet))


def test_an_adapter_that_is_not_finite_is_not_written(unet, tmp_path):
    lora.add_lora(unet, LoraConfig(rank=4), seed=1)[0].data.fill_(float("nan"))
    with pytest.raises(lora.LoraError, match="not finite"):
        lora.save_lora(unet, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_matches_no_layer_is_named(unet):
    with pytest.raises(lora.LoraError, match="to_z"):
        lora.add_lora(unet, LoraConfig(target_modules=["to_q", "to_z"]), seed=0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_convolutions_have_a_rank_of_their_own_and_the_scale_of_all(unet, tmp_path, use_rslora):
    config = LoraConfig(rank=8, conv_rank=2, lora_alpha=4, target_modules=["full"], use_rslora=use_rslora)
    lora.add_lora(unet, config, seed=0)
    layers = [module for module in unet.modules() if lora.ADAPTER in getattr(module, "scaling", {})]
    scales = [layer.scaling[lora.ADAPTER] for layer in layers]
    assert scales == pytest.approx([4 / 8**0.5 if use_rslora else 0.5] * len(layers))

    # A convolution's A has four dimensions, a linear's two; in both the rank is the first.
    downs = [
        tensor
        for name, tensor in load_file(lora.save_lora(unet, tmp_path)).items()
        if "down" in name.split(".lora.")[-1]
    ]
    assert {(tensor.ndim, tensor.shape[0]) for tensor in downs} == {(2, 8), (4, 2)}


def test_an_adapter_for_another_base_is_refused(unet, base, tmp_path):
    lora.add_lora(unet, LoraConfig(rank=4), seed=1)
    state = load_file(lora.save_lora(unet, tmp_path))
    wider = {
        name: torch.zeros(4, 320) if "lora.down" in name or "lora_A" in name else tensor
        for name, tensor in state.items()
    }
    elsewhere = {name.replace("down_blocks.1", "down_blocks.7"): tensor for name, tensor in state.items()}
    for number, (tensors, word) in enumerate(
        [(wider, "inputs"), (elsewhere, "does not exist"), ({}, "no LoRA")]
    ):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors or {"x": torch.zeros(1)}, file)
        with pytest.raises(lora.LoraError, match=word):
            lora.read_lora(base.load_unet_pipeline(torch.float32), file)


def test_a_file_that_is_no_adapter_is_named(base, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(lora.LoraError, match=r"x\.safetensors"):
        lora.read_lora(base.load_unet_pipeline(torch.float32), tmp_path / "x.safetensors")
    (tmp_path / "x.bin").write_bytes(b"junk")
    with pytest.raises(lora.LoraError, match="can run code"):
        lora.find_lora(tmp_path / "x.bin")
    with pytest.raises(lora.LoraError, match=r"train first.*such as .*/x\.safetensors$"):
        lora.find_lora(tmp_path)
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(lora.LoraError, match=r"train first.*a \.safetensors file$"):
        lora.find_lora(tmp_path)


def test_the_tiny_model_is_a_whole_sdxl_pipeline_of_at_most_10_mb(tiny_pipeline):
    assert isinstance(tiny_pipeline, StableDiffusionXLPipeline)
    files = [path for path in TINY.rglob("*") if path.suffix in (".safetensors", ".json", ".txt")]
    assert len(files) > 10
    assert sum(path.stat().st_size for path in files) < 10e6


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_vocabulary_is_refused(tmp_path, part):
    shutil.copytree(TINY, tmp_path / "base")
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tmp_path / "base" / part / file).unlink()
    base = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base")))
    assert base.find_tokenizers() is None
    with pytest.raises(ModelError):
        base.load_text_pipeline(torch.float32)
