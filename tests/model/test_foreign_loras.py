"""LoRAs of other programs: their change of weights is exactly what is drawn, or they are refused by name."""

import copy
import re
from collections import Counter

import peft
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from safetensors.torch import save_file

from lora_utils.config.schema import ModelConfig
from lora_utils.model import lora, lora_names
from lora_utils.model.architectures import UNET
from lora_utils.model.base import PretrainedSdxl
from tests.conftest import TINY
from tests.model import lora_files
from tests.model.test_base_and_lora import call

CASES = lora_files.cases()
PLAIN = [name for name, case in CASES.items() if case.target == "all" and not case.is_dora]
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def plain_pipeline():
    return PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY))).load_unet_pipeline(
        torch.float32
    )


@pytest.fixture
def pipeline(plain_pipeline):
    yield plain_pipeline
    plain_pipeline.unload_lora_weights()


def changes(pipeline):
    """What the adapter that is loaded changes each weight by."""
    measured = {}
    for name, module in pipeline.unet.named_modules():
        if hasattr(module, "lora_A"):
            merged = copy.deepcopy(module)
            merged.merge()
            measured[name] = merged.get_base_layer().weight.double() - module.get_base_layer().weight.double()
    return measured


def assert_changes(pipeline, expected):
    measured = changes(pipeline)
    assert measured.keys() == expected.keys()
    for layer, change in expected.items():
        error = (measured[layer] - change).norm() / change.norm()
        assert error < 1e-5, f"{layer} is off by {error:.1%}"


def test_the_files_differ_in_everything_that_matters(plain_pipeline):
    assert len(CASES) >= 80
    assert len(PLAIN) >= 12
    layers = lora_files.adaptable(plain_pipeline.unet)
    for choose in lora_files.TARGETS.values():
        assert 8 <= sum(map(choose, layers)) <= len(layers)
    assert len({lora_files.sai(layer) for layer in layers}) == len(layers)
    for column in ("alpha", "precision", "is_dora", "has_texts", "ranks", "as_convolutions"):
        counts = Counter(getattr(case, column) for case in CASES.values())
        assert len(counts) >= 2
        assert min(counts.values()) >= 8


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_file_changes_the_weights_as_it_says(pipeline, tmp_path, caplog, case):
    expected = lora_files.write(case, pipeline.unet, tmp_path / "x.safetensors")
    lora.load_lora(pipeline, lora.read_lora(pipeline, tmp_path / "x.safetensors"))
    assert_changes(pipeline, expected)
    told = caplog.text
    assert told.count("left out") == case.has_texts
    if case.has_texts:
        assert "9 tensors of the first text encoder, 9 tensors of the second" in told


def write_layers(file, unet, layers, metadata=None, **extra):
    """Halves of rank 2 by diffusers' names; extra tensors by the ends of their names, for the first layer."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer in layers:
        down, up = lora_files.halves(unet.get_submodule(layer), 2, generator)
        state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    state |= {f"{layers[0]}.{end.replace('_dot_', '.')}": tensor for end, tensor in extra.items()}
    save_file({f"unet.{name}": tensor for name, tensor in state.items()}, file, metadata)
    return state


def load(pipeline, file):
    lora.load_lora(pipeline, lora.read_lora(pipeline, file))


@pytest.mark.parametrize("name", PLAIN[::3])
def test_the_unet_draws_as_if_its_weights_were_changed(pipeline, tmp_path, name):
    expected = lora_files.write(CASES[name], pipeline.unet, tmp_path / "x.safetensors")
    changed = copy.deepcopy(pipeline.unet)
    for layer, change in expected.items():
        changed.get_submodule(layer).weight.data += change.float() / 8
    load(pipeline, tmp_path / "x.safetensors")
    pipeline.unet.set_adapters(lora.ADAPTER, 1 / 8)
    torch.testing.assert_close(call(pipeline.unet), call(changed), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("naming", "target", "alpha"),
    [
        ("sd-scripts", "attn+ff", "1"),
        ("sd-scripts", "all", "none"),
        ("sd-scripts, diffusers' blocks", "attn", "rank"),
        ("diffusers 2023", "attn", "none"),
        ("diffusers 2024", "attn", "none"),
        ("diffusers 2025", "all", "none"),
    ],
)
def test_what_diffusers_reads_right_is_read_the_same(
    pipeline, fresh_pipeline, tmp_path, naming, target, alpha
):
    case = lora_files.Case(lora_files.NAMINGS[naming], target, alpha, "fp32", is_dora=False, has_texts=False)
    lora_files.write(case, pipeline.unet, tmp_path / "x.safetensors")
    load(pipeline, tmp_path / "x.safetensors")
    fresh_pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    assert_changes(pipeline, changes(fresh_pipeline))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 2},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "lora_alpha": 2, "rank_pattern": {"to_k": 5}, "alpha_pattern": {"to_k": 1, "attn1.to_q": 7}},
        {"r": 2, "lora_alpha": 4, "use_dora": True},
        {"r": 2, "lora_alpha": 4, "lora_bias": True, "target_modules": ["to_out.0", "conv1"]},
    ],
)
def test_what_peft_saves_means_what_it_meant_to_peft(pipeline, tmp_path, settings):
    theirs = copy.deepcopy(pipeline.unet)
    config = peft.LoraConfig(**{"target_modules": ["to_q", "to_k", "conv1"]} | settings)
    theirs = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data = noise if "magnitude" not in name else parameter.data * (1 + noise)
    theirs.save_pretrained(tmp_path)
    load(pipeline, lora.find_lora(tmp_path))
    pipeline.unet.set_adapters(lora.ADAPTER, 1.0)
    torch.testing.assert_close(call(pipeline.unet), call(theirs), rtol=1e-3, atol=1e-4)


def test_without_its_settings_pefts_alpha_is_the_rank_and_that_is_told(pipeline, tmp_path, caplog):
    state = write_layers(tmp_path / "adapter_model.safetensors", pipeline.unet, [QUERY])
    load(pipeline, tmp_path / "adapter_model.safetensors")
    expected = lora_files.product(state[f"{QUERY}.lora_A.weight"], state[f"{QUERY}.lora_B.weight"])
    assert_changes(pipeline, {QUERY: expected.double()})
    assert "adapter_config.json" in caplog.text


def test_dora_on_some_layers_leaves_the_others_plain_at_every_strength(pipeline, tmp_path):
    magnitude = torch.rand(64) + 0.5
    layers = [QUERY, QUERY.replace("to_q", "to_k")]
    state = write_layers(tmp_path / "x.safetensors", pipeline.unet, layers, lora_magnitude_vector=magnitude)
    load(pipeline, tmp_path / "x.safetensors")
    for strength in (1.0, 0.5):
        pipeline.unet.set_adapters(lora.ADAPTER, strength)
        expected = {}
        for layer in layers:
            change = lora_files.product(state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"])
            expected[layer] = strength * change.double()
        weight = pipeline.unet.get_submodule(QUERY).get_base_layer().weight.detach().double()
        expected[QUERY] = lora_files.dora(weight, expected[QUERY], magnitude.double()) - weight
        assert_changes(pipeline, expected)


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        ({"alpha": torch.tensor(3)}, 1.5),
        ({"alpha": torch.tensor([-1.0], dtype=torch.bfloat16)}, -0.5),
        ({"alpha": torch.tensor([[4.0]], dtype=torch.float64)}, 2.0),
        ({"alpha": torch.tensor(1.0).to(torch.float8_e4m3fn)}, 0.5),
        ({"lora_A_dot_weight_dot_alpha": torch.tensor(1.0)}, 0.5),
        ({"scalar": torch.tensor(0.25)}, 0.25),
        ({"alpha": torch.tensor(1.0), "scalar": torch.tensor([3.0])}, 1.5),
    ],
)
def test_numbers_of_every_type_scale_their_layer_alone(pipeline, tmp_path, extra, factor):
    layers = [QUERY, QUERY.replace("to_q", "to_k")]
    state = write_layers(tmp_path / "x.safetensors", pipeline.unet, layers, **extra)
    load(pipeline, tmp_path / "x.safetensors")
    expected = {}
    for layer, strength in zip(layers, (factor, 1.0), strict=True):
        change = lora_files.product(state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"])
        expected[layer] = strength * change.double()
    assert_changes(pipeline, expected)


def test_a_tucker_convolution_is_one_product(pipeline, tmp_path):
    layer = "down_blocks.1.resnets.0.conv1"
    outputs, inputs, *kernel = pipeline.unet.get_submodule(layer).weight.shape
    down, mid, up = torch.randn(4, inputs, 1, 1), torch.randn(4, 4, *kernel), torch.randn(outputs, 4, 1, 1)
    state = {"down": down, "mid": mid, "up": up}
    name = "lora_unet_" + lora_files.sai(layer).replace(".", "_")
    save_file(
        {f"{name}.lora_{end}.weight": tensor for end, tensor in state.items()}, tmp_path / "x.safetensors"
    )
    load(pipeline, tmp_path / "x.safetensors")
    # What the three convolutions do to each input channel's unit impulse is the kernel itself, mirrored.
    impulses = torch.zeros(inputs, inputs, 5, 5)
    impulses[range(inputs), range(inputs), 2, 2] = 1
    answers = F.conv2d(F.conv2d(F.conv2d(impulses, down), mid, padding=1), up)
    expected = answers[:, :, 1:4, 1:4].flip(-1, -2).transpose(0, 1)
    assert_changes(pipeline, {layer: expected.double()})


def test_a_layer_twice_by_two_names_counts_once(pipeline, tmp_path):
    state = write_layers(tmp_path / "x.safetensors", pipeline.unet, [QUERY])
    twice = {f"unet.{name}": tensor for name, tensor in state.items()}
    name = "lora_unet_" + QUERY.replace(".", "_")
    twice[f"{name}.lora_down.weight"] = state[f"{QUERY}.lora_A.weight"]
    twice[f"{name}.lora_up.weight"] = state[f"{QUERY}.lora_B.weight"]
    save_file({name: tensor.clone() for name, tensor in twice.items()}, tmp_path / "x.safetensors")
    load(pipeline, tmp_path / "x.safetensors")
    change = lora_files.product(state[f"{QUERY}.lora_A.weight"], state[f"{QUERY}.lora_B.weight"])
    assert_changes(pipeline, {QUERY: change.double()})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"bundle_emb.word.clip_l": torch.ones(2, 8)}, "1 tensor of embeddings bundled with it"),
        ({"lora_te_text_model_x.hada_w1_a": torch.ones(2)}, "1 tensor of the first text encoder"),
        ({"base_model.model.text_model.x.lora_A.weight": torch.ones(2)}, "1 tensor of a text encoder"),
        ({"number": torch.ones(1), "other": torch.ones(1)}, r"2 tensors of no known use \(number\)"),
        ({"unet.conv_in.alpha": torch.ones(1)}, "1 tensor of layers without an update"),
        ({f"unet.{QUERY}.alpha": torch.zeros(1)}, "1 of 1 layers change nothing"),
    ],
)
def test_what_is_not_drawn_is_told_in_a_sentence(pipeline, tmp_path, caplog, extra, words):
    state = write_layers(tmp_path / "x.safetensors", pipeline.unet, [QUERY])
    save_file({f"unet.{name}": tensor for name, tensor in state.items()} | extra, tmp_path / "x.safetensors")
    lora.read_lora(pipeline, tmp_path / "x.safetensors")
    assert len(caplog.records) == 1
    assert re.search(words, caplog.text)


def test_sais_names_of_the_real_sdxl_are_diffusers_names():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET)
    table = lora_names.layer_table(unet)
    layers = set(table.values())
    assert len(layers) == len(lora_files.adaptable(unet)) == 794
    by_sai = {
        name: layer for name, layer in table.items() if re.match("input_blocks_[1-9]|middle_|output_", name)
    }
    state = {f"lora_unet_{name}.lora_down.weight": name for name in by_sai if not name.endswith("to_out")}
    state |= {name.replace("lora_down", "lora_up"): layer for name, layer in state.items()}
    assert len(state) == 2 * (len(layers) - 6)  # the first, the last, and the embeddings of time and size
    blocks = _maybe_map_sgm_blocks_to_diffusers(state, unet.config)
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(blocks)
    assert len(theirs) == 2 * (len(layers) - 6)
    for name, sai_name in theirs.items():
        layer = name.replace(".processor", "").replace("to_out_lora", "to_out.0_lora")
        assert re.sub(r"^unet\.|[._]lora\.(down|up)\.weight$", "", layer) == by_sai[sai_name]
