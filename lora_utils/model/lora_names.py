"""Names of a LoRA's tensors: what programs call them, and which layer of this U-Net each one means.

A name is a layer and an ending. Layers come by diffusers' names or by those of SAI's own code, with dots or
with underscores, behind one of several prefixes. Written with underscores all of them are distinct, so that
one table of this U-Net's layers reads every mixture.
"""

import re
from typing import Literal, NamedTuple

from diffusers import UNet2DConditionModel
from torch import nn

Role = Literal["down", "up", "mid", "bias", "alpha", "scalar", "magnitude", "dora_scale"]

_DOWN = r"lora_A|lora_down|lora\.down|lora_linear_layer\.down"
_UP = r"lora_B|lora_up|lora\.up|lora_linear_layer\.up"
_ADAPTER = r"(?:\.(?!weight$|bias$|alpha$)[\w-]+)?"  # peft's name of the adapter, most often default
_ENDINGS: dict[Role, str] = {
    "down": rf"[._](?:{_DOWN}){_ADAPTER}(?:\.weight)?",
    "up": rf"[._](?:{_UP}){_ADAPTER}(?:\.weight)?",
    "mid": r"[._]lora_mid(?:\.weight)?",
    "bias": rf"[._](?:{_UP}){_ADAPTER}\.bias",
    "alpha": rf"(?:[._](?:{_DOWN}|{_UP})(?:\.weight)?)?\.alpha",
    "scalar": r"\.scalar",
    "magnitude": rf"[._]lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
}
_PATTERNS: dict[Role, re.Pattern[str]] = {
    role: re.compile(f"(?:{ending})$") for role, ending in _ENDINGS.items()
}

PREFIXES = (
    "base_model.model.",  # peft
    "module.",  # accelerate
    "unet.",  # diffusers
    "lora_unet_",  # sd-scripts
    "lycoris_",  # LyCORIS outside of sd-scripts
    "model.diffusion_model.",  # SAI's checkpoints
    "diffusion_model.",  # ComfyUI
)

# SAI's names, by diffusers'. Those of blocks depend on how many there are.
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_IN_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}

_OTHER_PARTS = {
    "of the first text encoder": r"lora_te1?_|text_encoder\.|(text_encoders\.)?clip_l\.",
    "of the second text encoder": r"lora_te2_|text_encoder_2\.|(text_encoders\.)?clip_g\.",
    "of a text encoder": r"lora_te\d_|text_encoder|(lycoris_|transformer\.)?text_model|t5|te\d?[._]",
    "of embeddings bundled with it": r"bundle_emb\.",
}


class TensorName(NamedTuple):
    """A tensor's name, taken apart."""

    layer: str
    """As in ``layer_table``."""
    role: Role


def parse_name(name: str) -> TensorName | None:
    """Layer and role; None of a name that no LoRA's tensor has."""
    for role, pattern in _PATTERNS.items():
        if match := pattern.search(name):
            layer = plain_layer(name[: match.start()])
            return TensorName(layer.removesuffix("_lora"), role)  # the layer of to_q_lora.alpha is to_q
    return None


def plain_layer(name: str) -> str:
    """A layer's name with underscores alone, without prefixes and diffusers' word of 2023, processor."""
    name = name.replace("_orig_mod.", "")  # torch.compile
    while prefix := next(filter(name.startswith, PREFIXES), None):
        name = name.removeprefix(prefix)
    return name.replace(".", "_").replace("_processor_", "_")


def other_part(name: str) -> str | None:
    """Which part of a pipeline a tensor is for, when it is not the U-Net: the end of a sentence."""
    name = name.removeprefix("base_model.model.")
    return next((part for part, start in _OTHER_PARTS.items() if re.match(start, name)), None)


def layer_table(unet: UNet2DConditionModel) -> dict[str, str]:
    """The U-Net's linear and convolutional layers, by every name that programs have for them."""
    blocks = _sai_blocks(unet)
    table = {}
    for layer, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        names = [layer, *(_sai_name(layer, block, sai) for block, sai in blocks.items())]
        for name in filter(None, names):
            table[plain_layer(name)] = layer
            table[plain_layer(name).replace("to_out_0", "to_out")] = layer  # diffusers in 2023
    return table


def _sai_name(layer: str, block: str, sai: str) -> str | None:
    """SAI's name of a layer, if it is in the block, or is the block."""
    if layer == block:
        return sai
    if not layer.startswith(f"{block}."):
        return None
    inner = layer.removeprefix(f"{block}.")
    return f"{sai}.{_IN_RESNETS.get(inner, inner)}"


def _sai_blocks(unet: UNet2DConditionModel) -> dict[str, str]:
    """SAI counts resnets and resamplers through: diffusers' blocks, and what they are there."""
    names = dict(_OUTSIDE_BLOCKS)
    count = 1  # input_blocks.0 is the first convolution
    for number, block in enumerate(unet.down_blocks):
        for index in range(len(block.resnets)):
            names[f"down_blocks.{number}.resnets.{index}"] = f"input_blocks.{count}.0"
            names[f"down_blocks.{number}.attentions.{index}"] = f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers:
            names[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1

    count = 0
    for number, block in enumerate(unet.up_blocks):
        for index in range(len(block.resnets)):
            names[f"up_blocks.{number}.resnets.{index}"] = f"output_blocks.{count}.0"
            names[f"up_blocks.{number}.attentions.{index}"] = f"output_blocks.{count}.1"
            count += 1
        if block.upsamplers:
            position = 2 if getattr(block, "attentions", None) else 1  # the last in the last resnet's block
            names[f"up_blocks.{number}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{position}.conv"
    return names
