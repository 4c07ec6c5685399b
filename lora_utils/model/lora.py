"""LoRA adapters on the SDXL U-Net: attach, save, load."""

import logging
import math
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from lora_utils import UserError
from lora_utils.config.training import LoraConfig
from lora_utils.model.files import FAILURES
from lora_utils.system.files import PARTIAL, write_atomically

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LINEARS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]  # what sd-scripts adapts too
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
TARGETS = {"attn": ATTENTION, "attn+ff": LINEARS, "full": [*LINEARS, *CONVOLUTIONS]}
DOWN_ENDINGS = (".lora_A.weight", ".lora.down.weight")  # of the tensor A: peft's name, diffusers' name
LOGGER = logging.getLogger(__name__)


class LoraError(UserError):
    """An adapter cannot be attached, saved or loaded."""


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
                f"target_modules: no layer of the U-Net is called '{target}'; the usual word is attn"
            )

    # peft draws from the global generator: seeded here, and given back as it was.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(
            PeftLoraConfig(
                r=config.rank,
                lora_alpha=config.lora_alpha or config.rank,
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
    """The weight file: the path itself, or the usual name in a folder.

    Raises:
        LoraError: There is none.
    """
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise LoraError(f"there is no LoRA at {file}; train first, or set lora_path to a .safetensors file")
    if file.suffix != ".safetensors":
        raise LoraError(f"{file} is not a .safetensors file; other formats can run code when they are opened")
    return file


@dataclass(frozen=True)
class LoraWeights:
    """An adapter's file, read and found to fit."""

    file: Path
    state: dict[str, Tensor]
    """By diffusers' names."""
    alphas: dict[str, float] | None
    """Of kohya's files, by layer."""
    metadata: dict[str, Any] | None
    """Of peft's configuration what ``_Strength`` lets through."""


class _Strength(pydantic.BaseModel):
    """What an adapter's file may set of peft's configuration; a rank is its tensors'.

    Other fields name modules to import, or hold patterns that take for ever to match.
    """

    lora_alpha: pydantic.FiniteFloat
    alpha_pattern: dict[
        Annotated[str, pydantic.StringConstraints(pattern=r"^\^?[\w.]+$")], pydantic.FiniteFloat
    ] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False


def read_lora(pipeline: StableDiffusionXLPipeline, file: Path) -> LoraWeights:
    """Read an adapter in diffusers' or kohya's format for the pipeline's U-Net; the pipeline stays as it is.

    Raises:
        LoraError: The file is damaged, or made for a base model of another shape.
    """
    options = {"unet_config": pipeline.unet.config, "use_safetensors": True, "return_lora_metadata": True}
    try:
        state, alphas, metadata = pipeline.lora_state_dict(str(file.parent), weight_name=file.name, **options)
        downs = _check_fit(state, pipeline.unet, file)
        metadata = metadata and _peft_settings(metadata, downs)
    except FAILURES as error:
        reason = f"{type(error).__name__}: " + " ".join(str(error).split())[:300]
        raise LoraError(f"{file} cannot be read as a LoRA ({reason}); train or download it again") from error
    if any(name.startswith("text_encoder") for name in state):
        LOGGER.warning("%s also changes the text encoders; that part is left out here", file)
    return LoraWeights(file, state, alphas, metadata)


def load_lora(pipeline: StableDiffusionXLPipeline, weights: LoraWeights) -> None:
    """Put the adapter into the pipeline's U-Net, at scale 1.

    Raises:
        LoraError: Its tensors do not fit each other.
    """
    try:
        pipeline.load_lora_into_unet(
            weights.state, weights.alphas, pipeline.unet, adapter_name=ADAPTER, metadata=weights.metadata
        )
    except torch.OutOfMemoryError:
        raise  # a RuntimeError too, but nothing is wrong with the file
    except FAILURES as error:
        reason = " ".join(str(error).split())[:300]
        raise LoraError(
            f"{weights.file} does not fit together ({reason}); train or download it again"
        ) from error


def _peft_settings(metadata: dict[str, Any], downs: dict[str, Tensor]) -> dict[str, Any] | None:
    """Of the settings in a file those that decide what its tensors mean; None if none is for the U-Net."""
    given = {
        name.removeprefix("unet."): value for name, value in metadata.items() if name.startswith("unet.")
    }
    if not given:
        return None
    strength = _Strength.model_validate(given)
    if len(strength.alpha_pattern) > len(downs):  # peft tries every pattern on every layer
        raise ValueError(f"{len(strength.alpha_pattern)} alphas for {len(downs)} layers")

    # Ranks and layers from the tensors themselves: a file could claim others, and ask for any amount of
    # memory.
    ranks = {module: tensor.shape[0] for module, tensor in downs.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    settings = {"r": usual, "rank_pattern": others, "target_modules": list(ranks), **strength.model_dump()}
    return {f"unet.{name}": value for name, value in settings.items()}


def _check_fit(state: dict[str, Tensor], unet: UNet2DConditionModel, file: Path) -> dict[str, Tensor]:
    """The tensor A of each layer, by the layer's name."""
    layers = dict(unet.named_modules())
    downs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise LoraError(f"{name} in {file} is not finite; train it again with less learning_rate")
        for ending in DOWN_ENDINGS:
            if name.startswith("unet.") and name.endswith(ending):
                downs[name.removeprefix("unet.").removesuffix(ending)] = tensor
    if not downs:
        raise LoraError(f"{file} holds no LoRA for an SDXL U-Net; choose another file as lora_path")
    for module, tensor in downs.items():
        layer = layers.get(module)  # not the weight's shape: quantised weights are packed
        inputs = getattr(layer, "in_features", getattr(layer, "in_channels", None))
        if inputs != tensor.shape[1]:
            reason = "does not exist" if inputs is None else f"takes {inputs} inputs, not {tensor.shape[1]}"
            raise LoraError(
                f"{file} was made for another base model: {module} {reason} here; set "
                "pretrained_model_name_or_path to the model that it was trained on"
            )
    return downs
