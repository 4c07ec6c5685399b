"""LoRA files as other programs write them, for the tiny U-Net, each with the change of weights that it means.

The names were read in the programs' own code, in 2023 to 2026. Nothing here uses ours.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 3
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SAI_BLOCKS = {  # counted through, with the tiny U-Net's one residual block a level (SDXL has two)
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.4.0.op",
    "down_blocks.2.resnets.0": "input_blocks.5.0",
    "down_blocks.2.attentions.0": "input_blocks.5.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.3.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.4.0",
    "up_blocks.2.resnets.1": "output_blocks.5.0",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
SAI_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def is_attention(layer: str) -> bool:
    return "attn" in layer and layer.endswith(ATTENTION)


TARGETS: dict[str, Callable[[str], bool]] = {
    "attn": is_attention,
    "attn+ff": lambda layer: "attentions" in layer,
    "block": lambda layer: layer.startswith("up_blocks.1.attentions.1"),
    "convs": lambda layer: "conv" in layer,
    "all": lambda layer: True,
}


def sai(layer: str) -> str:
    """A layer's name in SAI's code."""
    for block, name in SAI_BLOCKS.items():
        if layer == block:
            return name
        if layer.startswith(f"{block}."):
            inner = layer.removeprefix(f"{block}.")
            return f"{name}.{SAI_RESNETS.get(inner, inner)}"
    raise KeyError(layer)


def processor(layer: str) -> str:
    """A layer's name in diffusers' files of 2023, up to the word lora and its dot or underscore."""
    if not is_attention(layer):
        return f"{layer}."
    attention, _, projection = layer.partition(".to_")
    return f"{attention}.processor.to_{projection.removesuffix('.0')}_"


@dataclass(frozen=True)
class Naming:
    """What a program calls the tensors of a layer."""

    layer: Callable[[str], str]
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: str = ".alpha"
    dora: str = ".dora_scale"


KOHYA = Naming(lambda layer: "lora_unet_" + sai(layer).replace(".", "_"))
PEFT = Naming(
    lambda layer: f"base_model.model.{layer}",
    ".lora_A.weight",
    ".lora_B.weight",
    dora=".lora_magnitude_vector",
)
OLD = Naming(
    lambda layer: f"unet.{processor(layer)}",
    "lora.down.weight",
    "lora.up.weight",
    "lora.down.weight.alpha",
    "lora.dora_scale",
)
NAMINGS = {
    "sd-scripts": KOHYA,
    "sd-scripts, diffusers' blocks": Naming(lambda layer: "lora_unet_" + layer.replace(".", "_")),
    "diffusers 2023": replace(OLD, dora="lora.lora_magnitude_vector.weight"),
    "diffusers 2023, no prefix": replace(OLD, layer=processor, alpha="lora.alpha"),
    "diffusers 2024": Naming(lambda layer: f"unet.{layer}", ".lora.down.weight", ".lora.up.weight"),
    "diffusers 2025": replace(PEFT, layer=lambda layer: f"unet.{layer}"),
    "peft": PEFT,
    "peft, no prefix": replace(PEFT, layer=str),
    "peft, unet": replace(
        PEFT, layer=lambda layer: f"base_model.model.unet.{layer}", dora=".lora_magnitude_vector.weight"
    ),
    "peft, its state": replace(
        PEFT,
        down=".lora_A.default.weight",
        up=".lora_B.default.weight",
        dora=".lora_magnitude_vector.default.weight",
    ),
    "OneTrainer": Naming(lambda layer: f"unet.{sai(layer)}"),
    "OneTrainer, inside": Naming(lambda layer: f"unet.{layer}"),
    "OneTrainer, SAI": Naming(sai, ".lora_A.weight", ".lora_B.weight"),
    "ComfyUI": Naming(lambda layer: f"diffusion_model.{sai(layer)}", ".lora_A.weight", ".lora_B.weight"),
    "ComfyUI, down": Naming(lambda layer: f"diffusion_model.{sai(layer)}"),
    "LyCORIS": Naming(lambda layer: "lycoris_" + layer.replace(".", "_")),
}
ALPHAS: dict[str, Callable[[int, int], float | None]] = {  # of a layer's number and rank
    "none": lambda number, rank: None,
    "1": lambda number, rank: 1.0,
    "rank": lambda number, rank: float(rank),
    "by layer": lambda number, rank: 0.25 + number % 5,
    "some missing": lambda number, rank: 0.5 if number % 3 else None,
}
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
TEXT_PARTS = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "first text encoder",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "second text encoder",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "first text encoder",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": "second text encoder",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1": "second text encoder",
    "clip_l.text_model.encoder.layers.0.mlp.fc1": "first text encoder",
}


@dataclass(frozen=True)
class Case:
    """How a file is written."""

    naming: Naming | tuple[Naming, ...]
    """One, or several in turn."""
    target: str
    alpha: str
    precision: str
    is_dora: bool
    has_texts: bool
    ranks: int = 1
    """How many different ranks."""
    as_convolutions: bool = False
    """Linear layers' halves as those of 1 x 1 convolutions, as in Stable Diffusion 1."""


def cases() -> dict[str, Case]:
    """Every naming on every target; alphas, precisions and the rest vary, and meet in all pairs with both."""
    table = {}
    pairs = itertools.product(NAMINGS, TARGETS)
    for number, (naming, target) in enumerate(pairs):
        alpha = list(ALPHAS)[(number + number // len(ALPHAS)) % len(ALPHAS)]
        precision = list(PRECISIONS)[number % len(PRECISIONS)]
        case = Case(
            NAMINGS[naming],
            target,
            alpha,
            precision,
            is_dora=number % 4 == 3 and not precision.startswith("e"),
            has_texts=number % 2 == 0,
            ranks=1 + 2 * (number % 3 == 1),
            as_convolutions=number % 7 == 2,
        )
        words = [naming, target, f"alpha {alpha}", precision, *["DoRA"][: case.is_dora]]
        table[", ".join(words)] = case
    mixtures = {
        "sd-scripts' two block names": ("sd-scripts", "sd-scripts, diffusers' blocks"),
        "diffusers' converter": ("diffusers 2023", "diffusers 2024"),
        "three programs": ("sd-scripts", "peft", "ComfyUI"),
    }
    for mixture, namings in mixtures.items():
        for alpha in ("none", "some missing"):
            mixed = tuple(NAMINGS[naming] for naming in namings)
            table[f"{mixture}, {alpha}"] = Case(mixed, "all", alpha, "fp16", is_dora=False, has_texts=True)
    return table


def adaptable(unet: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every layer that a LoRA can change."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not hasattr(module, "base_layer")
    }


def write(case: Case, unet: nn.Module, file: Path) -> dict[str, Tensor]:
    """Write the file; give what each layer's weight changes by, fp64, by the tensors as they are stored."""
    state = {}
    changes = {}
    generator = torch.Generator().manual_seed(0)
    layers = {name: module for name, module in adaptable(unet).items() if TARGETS[case.target](name)}
    namings = itertools.cycle(case.naming if isinstance(case.naming, tuple) else (case.naming,))
    dtype = PRECISIONS[case.precision]
    for number, (layer, module) in enumerate(layers.items()):
        naming = next(namings)
        prefix = naming.layer(layer)
        rank = RANK + number % case.ranks
        down, up = (tensor.to(dtype) for tensor in halves(module, rank, generator))
        if case.as_convolutions and down.ndim == 2:
            state[prefix + naming.down] = down[:, :, None, None]
            state[prefix + naming.up] = up[:, :, None, None]
        else:
            state[prefix + naming.down] = down
            state[prefix + naming.up] = up

        alpha = ALPHAS[case.alpha](number, rank)
        if alpha is not None:  # programs write numbers of every type, alone or in a list of one
            number_dtype = torch.int64 if alpha.is_integer() and number % 2 else torch.float32
            state[prefix + naming.alpha] = torch.full((1,) * (number % 2), alpha, dtype=number_dtype)
        strength = 1.0 if alpha is None else alpha / rank
        change = strength * product(down.double(), up.double()).reshape(module.weight.shape)

        if case.is_dora:
            size = torch.rand(module.weight.shape[0], generator=generator) + 0.5
            state[prefix + naming.dora] = shaped(size, module, naming.dora)
            weight = module.weight.detach().double()
            change = dora(weight, change, size.double()) - weight
        changes[layer] = change
    if case.has_texts:
        for name in TEXT_PARTS:
            state[f"{name}.lora_down.weight"] = torch.ones(2, 8)
            state[f"{name}.lora_up.weight"] = torch.ones(8, 2)
            state[f"{name}.alpha"] = torch.tensor(1.0)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return changes


def halves(module: nn.Module, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random, in the layer's own shapes."""
    outputs, inputs, *kernel = module.weight.shape
    down = torch.randn(rank, inputs, *kernel, generator=generator) / 4
    return down, torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator) / 4


def product(down: Tensor, up: Tensor) -> Tensor:
    """up x down, (outputs, all else)."""
    return up.flatten(1) @ down.flatten(1)


def dora(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """m (W + dW) / ||W + dW||, the norm over each output's weights (Liu et al., 2024, equation 5)."""
    moved = weight + change
    norm = moved.flatten(1).norm(dim=1)
    return moved * (magnitude / norm).reshape(-1, *[1] * (weight.ndim - 1))


def shaped(magnitude: Tensor, module: nn.Module, name: str) -> Tensor:
    """As peft keeps a magnitude by its own name, and LyCORIS and OneTrainer by theirs."""
    ones = [1] * (module.weight.ndim - 1)
    if name.endswith("dora_scale"):
        return magnitude.reshape(-1, *ones)
    return magnitude if len(ones) == 1 else magnitude.reshape(1, -1, 1, 1)
