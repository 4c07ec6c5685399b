"""The lean step against peft's own forward, on the tiny SDXL."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft.utils import get_peft_model_state_dict

from lora_utils import stages
from lora_utils.config.training import LoraConfig
from lora_utils.model import lora
from lora_utils.model.lean import make_lean
from tests.conftest import TINY

ADAPTERS = {
    "all layers": {},
    "attention": {"target_modules": ["attn"]},
    "other strength": {"lora_alpha": 8},
    "rsLoRA": {"use_rslora": True},
    "feed-forward": {"target_modules": ["attn+ff"]},
    "convolutions of a lower rank": {"target_modules": ["full"], "conv_rank": 2, "lora_alpha": 2},
    "queries alone": {"target_modules": ["to_q"]},
    "dropout": {"lora_dropout": 0.3},
    "DoRA": {"use_dora": True},
}


def new_unet(lean, dtype=torch.float64, **adapter):
    unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet", torch_dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.add_lora(unet, LoraConfig(rank=4, **adapter), seed=0):
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    if lean:
        make_lean(unet)
    return unet.train()


def predict(unet, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = [(2, config.in_channels, 8, 8), (2, 7, config.cross_attention_dim), (2, pooled)]
    latents, text, pooled_text = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    added = {"text_embeds": pooled_text, "time_ids": torch.full((2, 6), 64.0)}
    torch.manual_seed(3)  # of LoRA dropout
    return unet(latents, torch.tensor([3, 500]), text, added_cond_kwargs=added).sample


def gradients(unet, dtype=torch.float64):
    out = predict(unet, dtype)
    (out.float() ** 2 if dtype == torch.float16 else out**2).mean().backward()
    return out.detach(), [parameter.grad for parameter in unet.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_outputs_and_gradients_are_pefts(adapter):
    theirs, their_gradients = gradients(new_unet(False, **adapter))
    ours, our_gradients = gradients(new_unet(True, **adapter))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    assert len(our_gradients) > 10
    scale = max(gradient.abs().max() for gradient in their_gradients)
    for gradient, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(gradient / scale, other / scale, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_in_fp32_it_is_as_exact_as_pefts(adapter):
    """How far fp32 is from fp64 depends on the weights, so peft's own error is the bar."""
    exact, exact_gradients = gradients(new_unet(False, **adapter))
    scale = max(gradient.abs().max() for gradient in exact_gradients)

    def errors(lean):
        out, found = gradients(new_unet(lean, torch.float32, **adapter), torch.float32)
        worst = max((a - b).abs().max() for a, b in zip(found, exact_gradients, strict=True))
        return (out - exact).abs().max().item(), (worst / scale).item()

    for ours, theirs in zip(errors(True), errors(False), strict=True):
        assert ours < 2 * theirs < 1e-4


def test_fp16_gives_fp32_gradients_close_to_fp32s():
    _, exact = gradients(new_unet(False, torch.float32), torch.float32)
    _, ours = gradients(new_unet(True, torch.float16), torch.float16)
    assert {gradient.dtype for gradient in ours} == {torch.float32}
    ours, exact = (torch.cat([gradient.flatten() for gradient in each]) for each in (ours, exact))
    assert torch.nn.functional.cosine_similarity(ours, exact, dim=0) > 0.999


def test_queries_keys_and_values_come_from_one_node():
    unet = new_unet(True, target_modules=["attn"])
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    assert attentions
    met = set()
    queue = [predict(unet).grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in met:
            met.add(node)
            queue += [following for following, _ in node.next_functions]
    from_one_node = sum(3 if attention.is_cross_attention else 2 for attention in attentions)
    assert sum(node.name() == "_LoraLinearBackward" for node in met) == from_one_node


def test_names_and_weights_stay_what_they_are():
    plain = new_unet(False)
    lean = new_unet(True)
    assert plain.state_dict().keys() == lean.state_dict().keys()
    assert all(torch.equal(value, lean.state_dict()[name]) for name, value in plain.state_dict().items())
    assert get_peft_model_state_dict(plain).keys() == get_peft_model_state_dict(lean).keys()


def test_the_adapter_can_be_turned_off_and_merged_and_changed():
    unet = new_unet(True)
    base = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet").double()
    adapted = predict(unet)
    unet.disable_adapters()
    torch.testing.assert_close(predict(unet), predict(base), rtol=0, atol=1e-12)
    unet.enable_adapters()
    assert torch.equal(predict(unet), adapted)
    unet.fuse_lora()
    torch.testing.assert_close(predict(unet), adapted, rtol=0, atol=1e-5)
    unet.unfuse_lora()
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    torch.testing.assert_close(predict(unet), predict(base), rtol=0, atol=1e-5)


@pytest.mark.parametrize("road", ["peft's way", "all recomputed", "a part recomputed"])
def test_fifty_steps_go_the_same_way_by_any_road(make_config, tmp_path, tight_gib, road):
    common = {"max_train_steps": 50, "rank": 4, "train_batch_size": 1}
    options = {
        "peft's way": {"lean_step": False},
        "all recomputed": {"gradient_checkpointing": "full"},
        "a part recomputed": {"vram_gib": tight_gib(make_config(**common))},
    }[road]
    plain = [report.loss for report in stages.train(make_config(output_dir=tmp_path / "a", **common))]
    other = [
        report.loss for report in stages.train(make_config(output_dir=tmp_path / "b", **common, **options))
    ]
    assert other == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("adapter", ["other strength", "rsLoRA", "DoRA", "feed-forward", "all layers"])
def test_a_saved_adapter_does_the_same_in_diffusers(adapter, tmp_path, fresh_pipeline):
    unet = new_unet(True, torch.float32, **ADAPTERS[adapter]).eval()
    lora.save_lora(unet, tmp_path)
    fresh_pipeline.load_lora_weights(tmp_path, weight_name=lora.WEIGHTS_NAME)
    theirs = predict(fresh_pipeline.unet.eval(), torch.float32)
    torch.testing.assert_close(predict(unet, torch.float32), theirs, rtol=1e-3, atol=1e-4)
