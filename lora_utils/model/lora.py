"""LoRA adapters on the SDXL U-Net: attach, save, load."""

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lora_utils.config.training import LoraConfig
from lora_utils.model.lora_reader import read_updates
from lora_utils.model.lora_strength import PEFT_WEIGHTS
from lora_utils.model.lora_update import LayerUpdate, LoraError
from lora_utils.system.files import PARTIAL, write_atomically
from lora_utils.system.locations import looked_for

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LINEARS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]  # what sd-scripts adapts too
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
TARGETS = {"attn": ATTENTION, "attn+ff": LINEARS, "full": [*LINEARS, *CONVOLUTIONS]}


def add_lora(unet: UNet2DConditionModel, config: LoraConfig, seed: int) -> list[torch.nn.Parameter]:
    """Freeze the U-Net, attach adapters, return the adapters' parameters, fp32.

    The base keeps its dtype. A is Gaussian and B zero (Hu et al., 2021, section 4.1), so that the model
    starts unchanged.

    Args:
        unet: The base model's, without an adapter.
        config: Rank, scale and targets.
        seed: Decides A.

    Raises:
        LoraError: A target module matches no layer.
    """
    unet.requires_grad_(False)
    targets = [name for target in config.target_modules for name in TARGETS.get(target, [target])]
    names = [name for name, _ in unet.named_modules()]
    for target in targets:
        is_ours = any(
            target in group for group in TARGETS.values()
        )  # not every SDXL-shaped base has them all
        if not is_ours and not any(name == target or name.endswith(f".{target}") for name in names):
            raise LoraError(
                f"target_modules: no layer of the U-Net is called '{target}'; the usual word is full"
            )

    alpha: Any = config.lora_alpha or config.rank  # peft only divides it, though its hint says int
    ranks, alphas = _of_convolutions(unet, config, alpha)
    # peft draws from the global generator: seeded here, and given back as it was.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(
            PeftLoraConfig(
                r=config.rank,
                lora_alpha=alpha,
                rank_pattern=ranks,
                alpha_pattern=alphas,
                lora_dropout=config.lora_dropout,
                target_modules=targets,
                init_lora_weights="gaussian",
                use_rslora=config.use_rslora,
                use_dora=config.use_dora,
            ),
            ADAPTER,
        )
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()  # GradScaler refuses fp16 gradients
    return parameters


def _of_convolutions(
    unet: UNet2DConditionModel, config: LoraConfig, alpha: float
) -> tuple[dict[str, int], dict[str, Any]]:
    """Rank and alpha of each convolution, by patterns of its name, where they have a rank of their own."""
    if config.conv_rank is None:
        return {}, {}
    # The same scale for all updates: ``save_lora`` multiplies by one, and so does a reader's strength.
    ratio = config.conv_rank / config.rank
    own_alpha = alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
    names = [re.escape(name) for name, module in unet.named_modules() if isinstance(module, nn.Conv2d)]
    return dict.fromkeys(names, config.conv_rank), dict.fromkeys(names, own_alpha)


def save_lora(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Write the adapter in diffusers' format, whole or not at all; readable by ``load_lora_weights``.

    The update's scale is multiplied into B: readers that take alpha for rank then apply the right strength
    too.

    Raises:
        LoraError: The adapter holds NaN or infinity, and is not written.
    """
    adapter = unet.peft_config[ADAPTER]
    state: dict[str, Tensor] = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise LoraError(
                f"{name} is not finite, so the adapter was not saved; train again with less learning_rate"
            )

    scale = adapter.lora_alpha / (math.sqrt(adapter.r) if adapter.use_rslora else adapter.r)
    state = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in state.items()}

    # diffusers renames attention layers alone, and of a file with both names it reads one kind and drops the
    # other.
    renamed = {}
    for name, tensor in convert_state_dict_to_diffusers(state).items():
        renamed[name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")] = tensor

    # diffusers writes in place: into a folder of its own first, so that a half-written file never has the
    # name.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as staging:
        StableDiffusionXLPipeline.save_lora_weights(
            staging, unet_lora_layers=renamed, weight_name=WEIGHTS_NAME
        )
        write_atomically(folder / WEIGHTS_NAME, Path(staging, WEIGHTS_NAME).read_bytes())
    return folder / WEIGHTS_NAME


def find_lora(path: Path) -> Path:
    """The weight file: the path itself, or the usual name in a folder: ours and diffusers', or peft's.

    Raises:
        LoraError: There is none.
    """
    file = path
    if path.is_dir():
        names = [name for name in (WEIGHTS_NAME, PEFT_WEIGHTS) if (path / name).is_file()]
        file = path / (names[0] if names else WEIGHTS_NAME)
    if not file.is_file():
        others = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        hint = f", such as {others[0]}" if others else ""
        cure = f"train first, or set lora_path to a .safetensors file{hint}"
        raise LoraError(f"there is no LoRA at {looked_for(file)}; {cure}")
    if file.suffix != ".safetensors":
        raise LoraError(f"{file} is not a .safetensors file; other formats can run code when they are opened")
    return file


@dataclass(frozen=True)
class LoraWeights:
    """An adapter's file, read and found to fit."""

    file: Path
    updates: dict[str, LayerUpdate]
    """By the layer's name in the U-Net."""


def read_lora(pipeline: StableDiffusionXLPipeline, file: Path) -> LoraWeights:
    """Read an adapter of any program's for the pipeline's U-Net; the pipeline stays as it is.

    Raises:
        LoraError: The file is damaged, no LoRA, or made for a base model of another shape.
    """
    return LoraWeights(file, read_updates(pipeline.unet, file))


def load_lora(pipeline: StableDiffusionXLPipeline, weights: LoraWeights) -> None:
    """Put the adapter into the pipeline's U-Net, at scale 1."""
    unet = pipeline.unet
    has_dora = any(update.magnitude is not None for update in weights.updates.values())
    unet.add_adapter(
        PeftLoraConfig(r=1, lora_alpha=1, target_modules=list(weights.updates), use_dora=has_dora), ADAPTER
    )

    # Layer by layer: peft takes ranks of their own by patterns, each tried on each layer, and DoRA for all
    # layers or none. The strength is in the tensors: alpha is the rank.
    for name, update in weights.updates.items():
        layer = unet.get_submodule(name)
        device = layer.lora_A[ADAPTER].weight.device
        layer.lora_A[ADAPTER].weight = _frozen(update.down, device)
        layer.lora_B[ADAPTER].weight = _frozen(update.up, device)
        layer.lora_B[ADAPTER].bias = None if update.bias is None else _frozen(update.bias, device)
        layer.r[ADAPTER] = update.down.shape[0]
        layer.lora_alpha[ADAPTER] = update.down.shape[0]
        if update.magnitude is not None:
            layer.lora_magnitude_vector[ADAPTER].weight = _frozen(update.magnitude, device)
        elif has_dora:
            del layer.lora_variant[ADAPTER]
            del layer.lora_magnitude_vector[ADAPTER]


def _frozen(tensor: Tensor, device: torch.device) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.to(device), requires_grad=False)
