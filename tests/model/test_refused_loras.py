"""Files that cannot be drawn are refused in one sentence: what they are, and what to do next."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import save_file

from lora_utils.config.schema import ModelConfig
from lora_utils.config.training import LoraConfig
from lora_utils.model import lora
from lora_utils.model.base import PretrainedSdxl
from lora_utils.storage.checkpoint import flatten_state
from tests.conftest import TINY

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"
KOHYA = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
WIDTH = 64
DOWN, UP = torch.ones(2, WIDTH), torch.ones(WIDTH, 2)
WHOLE = {f"{QUERY}.lora_A.weight": DOWN, f"{QUERY}.lora_B.weight": UP}


def pair(name, inputs, outputs):
    return halves(name, torch.ones(2, inputs), torch.ones(outputs, 2))


def halves(name, down, up):
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


def of(name, *ends):
    return {f"{name}.{end}": torch.ones(2, 2) for end in ends}


OTHER_ADAPTERS = {
    "a LoHa": of(KOHYA, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "a LoHa | of peft": of(f"base_model.model.{QUERY}", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "a LoKr": of(KOHYA, "lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
    "a LoKr | with DoRA": of("lycoris_conv_in", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "dora_scale", "alpha"),
    "a GLoRA": of(KOHYA, "a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
    r"an \(IA\)3": of(KOHYA, "weight", "on_input"),
    r"an \(IA\)3 | of peft": of(f"base_model.model.{QUERY}", "ia3_l"),
    "an OFT": of("oft_unet_input_blocks_3_1_proj_in", "oft_blocks", "alpha"),
    "an OFT | of LyCORIS": of(KOHYA, "oft_diag", "rescale"),
    "a BOFT": of(f"base_model.model.{QUERY}", "boft_R", "boft_s"),
    "a VeRA": of(f"base_model.model.{QUERY}", "vera_lambda_b", "vera_lambda_d"),
    "an AdaLoRA": of(f"base_model.model.{QUERY}", "lora_A", "lora_B", "lora_E"),
    "a DyLoRA": of(KOHYA, "down_list.0", "up_list.0", "alpha"),
    "a difference of whole weights": of(KOHYA, "diff", "diff_b"),
    "trained norms": WHOLE | of("lora_unet_input_blocks_3_0_in_layers_0", "w_norm", "b_norm"),
    "in part a LoHa": WHOLE | of(CONV, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "in part a difference of whole weights": WHOLE | of(CONV, "diff_b"),
}
NO_ADAPTERS = {
    "a ControlNet-LLLite": of("lllite_unet_input_blocks_3_1_proj_in", "down.0.weight", "cond_emb.0.weight"),
    "a ControlNet": of("control_model.input_blocks.1.0", "in_layers.0.weight"),
    "a ControlNet | Control-LoRA": of("input_blocks.1.0.emb_layers.1", "up", "down")
    | {"lora_controlnet": DOWN},
    "an IP-Adapter": of("ip_adapter.1", "to_k_ip.weight") | of("image_proj", "proj.weight"),
    r"an embedding \(textual inversion\)": {"clip_g": torch.ones(1, 8), "clip_l": torch.ones(1, 4)},
    r"an embedding \(textual inversion\) | again": {"emb_params": torch.ones(1, 8)},
    "a VAE": of("encoder.conv_in", "weight"),
    "a whole model": of("model.diffusion_model.input_blocks.0.0", "weight")
    | of("first_stage_model.x", "weight"),
    "a whole model | again": of("down_blocks.1.resnets.0.conv1", "weight", "bias"),
    "in part whole weights": WHOLE | of("base_model.model.conv_in", "weight", "bias"),
    "in part of a sort that is not known": WHOLE | of(CONV, "reshape_weight"),
    "changes the text encoders alone": pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 8),
    "changes the text encoders alone | again": pair(
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 8, 8
    ),
    "holds no LoRA": {"x": torch.ones(1)},
    "holds no LoRA | again": {},
}
OTHER_BASES = {
    "Stable Diffusion 1 it seems.* takes 768 inputs in the file and 128 here": pair(TEXT_KEY, 768, WIDTH),
    "Stable Diffusion 2 it seems.* takes 1024 inputs in the file": pair(TEXT_KEY, 1024, WIDTH),
    "SDXL it seems.* takes 2048 inputs in the file": pair(TEXT_KEY, 2048, WIDTH),
    "refiner it seems.* takes 1280 inputs in the file": pair(TEXT_KEY, 1280, WIDTH),
    "other blocks it seems.* does not exist": pair(TEXT_KEY.replace("blocks_1", "blocks_7"), 128, WIDTH),
    "Flux it seems.* does not exist": pair("lora_unet_double_blocks_0_img_attn_qkv", 8, 8),
    "Flux it seems.* does not exist | again": pair("transformer.single_transformer_blocks.0.attn.to_q", 8, 8),
    "Stable Diffusion 3 it seems": pair("diffusion_model.joint_blocks.0.x_block.attn.qkv", 8, 8),
    "a transformer, not a U-Net": pair("diffusion_model.layers.0.attention.to_q", 8, 8),
    "another base model: .* takes 63 inputs in the file and 64 here": pair(KOHYA, 63, WIDTH),
    "another base model: .* gives 63 outputs in the file and 64 here": pair(KOHYA, WIDTH, 63),
    "takes 2 x 48 x 3 x 3 here, not 2 x 48": pair(CONV, 48, WIDTH),
    "its magnitude is 63": pair(KOHYA, WIDTH, WIDTH) | {f"{KOHYA}.dora_scale": torch.ones(63)},
}
BROKEN = {
    "has no up beside": {f"{KOHYA}.lora_down.weight": DOWN},
    "has no down beside": {f"{KOHYA}.lora_up.weight": UP},
    "has no down beside .*dora_scale": {f"{KOHYA}.dora_scale": torch.ones(WIDTH, 1)},
    "has no up beside .*conv_in": WHOLE | {"unet.conv_in.lora.down.weight": torch.ones(2, 4, 3, 3)},
    "halves of rank 2 and 5": halves(KOHYA, DOWN, torch.ones(64, 5)),
    "no matrices": halves(KOHYA, torch.ones(64), UP),
    "no matrices | again": halves(KOHYA, torch.ones(0, 64), torch.ones(64, 0)),
    "lora_A.* is not finite": WHOLE | {f"{QUERY}.lora_A.weight": DOWN * float("nan")},
    "alpha in .* is not finite": WHOLE | {f"{QUERY}.alpha": torch.tensor(float("inf"))},
    "alpha in .* holds 3 numbers": WHOLE | {f"{QUERY}.alpha": torch.ones(3)},
    "is not finite; train it again": WHOLE | {f"{QUERY}.lora_B.weight": UP.double() * 1e200},
    "too much for fp32": WHOLE | {f"{QUERY}.alpha": torch.tensor(3e38), f"{QUERY}.lora_B.weight": UP * 9},
    "is torch.int8, quantised": WHOLE | {f"{QUERY}.lora_A.weight": DOWN.to(torch.int8)},
    "holds two different (unet|lora_unet).* and (unet|lora_unet)": WHOLE | halves(KOHYA, DOWN * 2, UP),
    "a mid of 3 x 3": pair(CONV, 48, WIDTH) | {f"{CONV}.lora_mid.weight": torch.ones(3, 3)},
    "a magnitude for each input": WHOLE | {f"{QUERY}.dora_scale": torch.ones(1, WIDTH)},
    "two magnitudes": WHOLE | dict.fromkeys(
        [f"{QUERY}.lora_magnitude_vector", f"{QUERY}.dora_scale"], torch.ones(64)),
    "a DoRA with biases": WHOLE | dict.fromkeys(
        [f"{QUERY}.lora_B.bias", f"{QUERY}.dora_scale"], torch.ones(64)),
}  # fmt: skip
REFUSED = OTHER_ADAPTERS | NO_ADAPTERS | OTHER_BASES | BROKEN


@pytest.fixture(scope="module")
def pipeline():
    base = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY)))
    return base.load_unet_pipeline(torch.float32)


def refusal(pipeline, file):
    before = set(pipeline.unet.state_dict())
    with pytest.raises(lora.LoraError) as refused:
        lora.read_lora(pipeline, file)
    assert set(pipeline.unet.state_dict()) == before
    message = str(refused.value)
    assert str(file) in message
    assert "; " in message, "what to do next"
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("words", "tensors"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_drawn_is_refused_by_its_name(pipeline, tmp_path, words, tensors):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    assert re.search(words.split(" | ")[0], refusal(pipeline, tmp_path / "x.safetensors"))


def test_there_are_many_of_every_sort():
    assert len(REFUSED) == len(OTHER_ADAPTERS) + len(NO_ADAPTERS) + len(OTHER_BASES) + len(BROKEN) >= 60


def test_magnitudes_by_input_are_refused_of_convolutions_too(pipeline, tmp_path):
    for inputs, outputs, layer in ((48, 64, CONV), (64, 64, CONV.replace("conv1", "conv2"))):
        tensors = {
            f"{layer}.lora_down.weight": torch.ones(2, inputs, 3, 3),
            f"{layer}.lora_up.weight": torch.ones(outputs, 2, 1, 1),
            f"{layer}.dora_scale": torch.ones(1, inputs, 1, 1),
        }
        save_file(tensors, tmp_path / "x.safetensors")
        assert "a magnitude for each input" in refusal(pipeline, tmp_path / "x.safetensors")


def test_a_dora_that_lost_its_magnitudes_is_no_lora(pipeline, tmp_path):
    settings = json.dumps({"unet.lora_alpha": 2, "unet.use_dora": True})
    save_file(WHOLE, tmp_path / "x.safetensors", {"lora_adapter_metadata": settings})
    assert "a DoRA without a magnitude" in refusal(pipeline, tmp_path / "x.safetensors")


def test_a_checkpoints_adapter_points_to_the_run(pipeline, tmp_path):
    unet = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY))).load_unet(torch.float32)
    lora.add_lora(unet, LoraConfig(rank=2), seed=0)
    adapter = {name: tensor for name, tensor in unet.named_parameters() if tensor.requires_grad}
    tensors, _ = flatten_state({"adapter": adapter})
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / "adapter.safetensors")
    assert "a checkpoint's adapter" in refusal(pipeline, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig, peft.OFTConfig, peft.IA3Config])
def test_pefts_other_adapters_are_refused_with_their_own_settings(pipeline, tmp_path, config):
    unet = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY))).load_unet(torch.float32)
    extra = {"feedforward_modules": []} if config is peft.IA3Config else {}
    peft.get_peft_model(unet, config(target_modules=["to_q"], **extra)).save_pretrained(tmp_path)
    assert "cannot be drawn here" in refusal(pipeline, lora.find_lora(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "3", "null", '{"r": 2}', '{"lora_alpha": "x"}', '{"lora_alpha": Infinity}', "[" * 99_999],
)
def test_settings_beside_a_file_that_are_none_are_refused(pipeline, tmp_path, text):
    save_file(WHOLE, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    assert "cannot be read as a LoRA" in refusal(pipeline, tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "x.bin", "x.pkl", "x"])
def test_pickles_are_refused_before_they_are_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(lora.LoraError, match=r"can run code"):
        lora.find_lora(tmp_path / name)


def test_an_error_page_instead_of_a_file_is_named(pipeline, tmp_path):
    (tmp_path / "x.safetensors").write_text("<html>Sign in</html>" * 50)
    assert "download it again" in refusal(pipeline, tmp_path / "x.safetensors")
