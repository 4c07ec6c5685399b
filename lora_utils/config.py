"""Every setting, once: name, type, bounds, default and help.

A run is described by one frozen ``RunConfig`` in sections. Leaf names are unique over the sections and are the
flags of diffusers' training scripts where those have one, so ``--rank 8``, ``rank: 8`` under ``lora:`` in a YAML
file and ``{"rank": 8}`` in a notebook mean the same.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic.fields import FieldInfo

from lora_utils import UserError

Fraction = Annotated[float, Field(ge=0, lt=1)]
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Numbers = Annotated[list[int], BeforeValidator(lambda value: [value] if isinstance(value, int | str) else value)]


class ConfigError(UserError):
    """A setting is unknown or impossible."""


class Section(BaseModel):
    """A group of settings: frozen, strict about names, documented by the docstrings below its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class PathsConfig(Section):
    """Where things are written."""

    output_dir: Path = Path("runs/lora")
    """Run folder: weights, resolved config, metrics and pictures."""
    precompute_dir: Path | None = None
    """Folder of precomputed moments and embeddings; <output_dir>/precomputed when not given."""
    infer_path: Path | None = None
    """Folder for compare's pictures; <output_dir>/compare when not given."""
    cache_dir: Path | None = None
    """Where downloaded models are kept; Hugging Face's own folder when not given."""


class ModelConfig(Section):
    """Which SDXL, in which precision."""

    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """Hub id or local folder of the base model, in diffusers' layout."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE, such as madebyollin/sdxl-vae-fp16-fix; the base model's own when not given."""
    revision: str | None = None
    """Branch, tag or commit of a base model on the Hub."""
    variant: str | None = None
    """Weight files to load, such as fp16; the plain ones when not given."""
    mixed_precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the U-Net; auto is fp32 on CPU, bf16 from sm_80 (A100, L4), fp16 below (T4)."""


class DataConfig(Section):
    """What is learned from."""

    train_data_dir: Path | None = None
    """Folder of images, each with a caption file of the same name beside it."""
    caption_extension: Annotated[str, Field(pattern=r"^\.\w+$")] = ".txt"
    """Ending of the caption files."""
    resolution: Annotated[int, Field(ge=32, le=4096, multiple_of=8)] = 1024
    """Side of the training and comparison images in pixels; images are resized and centre-cropped to it."""
    caption_dropout_rate: Fraction = 0.0
    """Share of visits without caption, so that the unconditional side of guidance learns too."""
    validation_split: Fraction = 0.0
    """Share of the images that is held out of training to measure the held-out loss."""


class LoraConfig(Section):
    """Size and reach of the low-rank update (Hu et al., 2021)."""

    rank: PositiveInt = 16
    """Rank r of each update. Trainable parameters grow linearly with it."""
    lora_alpha: PositiveInt | None = None
    """The update is multiplied by lora_alpha / rank; equal to rank when not given."""
    lora_dropout: Fraction = 0.0
    """Share of a LoRA layer's inputs that is dropped during training."""
    target_modules: Texts = ["to_q", "to_k", "to_v", "to_out.0"]
    """Name endings of the U-Net layers that get an update."""


class TrainConfig(Section):
    """The training loop. A step is one optimiser update, a micro-batch one backward pass."""

    seed: NonNegativeInt = 0
    """Decides initial weights, data order, noise and timesteps: equal seeds give equal weights."""
    max_train_steps: PositiveInt | None = None
    """Optimiser updates in all; overrides num_train_epochs."""
    num_train_epochs: PositiveInt = 100
    """Passes over the data."""
    train_batch_size: PositiveInt = 1
    """Examples in a micro-batch, per process."""
    gradient_accumulation_steps: PositiveInt = 4
    """Micro-batches in a step."""
    learning_rate: NonNegativeFloat = 1e-4
    """Peak learning rate, after warm-up."""
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant"] = "constant"
    """Shape of the learning rate after warm-up, over max_train_steps."""
    lr_warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    use_8bit_adam: bool = False
    """AdamW from bitsandbytes with 8-bit states, instead of torch's."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of the second moment."""
    adam_weight_decay: NonNegativeFloat = 1e-2
    """Decoupled weight decay (Loshchilov & Hutter, 2019)."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    snr_gamma: PositiveFloat | None = None
    """Min-SNR weighting (Hang et al., 2023); 5 in the paper. Plain mean squared error when not given."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    validation_steps: PositiveInt = 100
    """Steps between measurements of the held-out loss."""


class CompareConfig(Section):
    """Base model against LoRA on equal seeds."""

    lora_path: Path | None = None
    """LoRA file, or a folder with pytorch_lora_weights.safetensors; <output_dir> when not given."""
    prompt: Texts = ["a photo"]
    """One or more prompts."""
    negative_prompt: str | None = None
    """What to steer away from."""
    seeds: Numbers = [0]
    """Each prompt is drawn once per seed, with the same initial noise for base and LoRA."""
    adapter_scale: NonNegativeFloat = 1.0
    """Strength of the LoRA; 0 is the base model."""
    num_inference_steps: PositiveInt = 30
    """Denoising steps."""
    guidance_scale: NonNegativeFloat = 5.0
    """Classifier-free guidance (Ho & Salimans, 2022); 1 and below turn it off."""


class RunConfig(Section):
    """The whole description of a run."""

    paths: PathsConfig = PathsConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    compare: CompareConfig = CompareConfig()


def settings() -> dict[str, tuple[str, FieldInfo]]:
    """Every leaf name with its section and field."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {
        leaf: (section, field)
        for section, model in sections.items()
        if isinstance(model, type) and issubclass(model, BaseModel)
        for leaf, field in model.model_fields.items()
    }


def load_config(file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Defaults, then the file's settings, then the overrides.

    Args:
        file: YAML with sections, or with leaf names at the top level.
        overrides: Leaf name to value; strings are converted to the setting's type.

    Raises:
        ConfigError: A name is unknown or a value impossible; all problems in one message.
    """
    leaves = _flatten(_read_yaml(file), f"{file}: ") if file else {}
    leaves |= _flatten(overrides or {}, "")
    sections: dict[str, dict[str, Any]] = {}
    for leaf, value in leaves.items():
        sections.setdefault(settings()[leaf][0], {})[leaf] = value
    try:
        return RunConfig.model_validate(sections)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"there is no config file {file}; the ready-made ones are in configs/")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file} must hold settings such as 'rank: 16', not a {type(content).__name__}")
    return content or {}


def _flatten(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if name in RunConfig.model_fields:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{where}'{name}' is a section; write its settings indented below it")
            for leaf, inner in (value or {}).items():
                if leaf in settings() and settings()[leaf][0] != name:
                    raise ConfigError(f"{where}'{leaf}' belongs under '{settings()[leaf][0]}:', not '{name}:'")
                leaves[_known(leaf, where)] = inner
        else:
            leaves[_known(name, where)] = value
    return leaves


def _known(name: object, where: str) -> str:
    if isinstance(name, str) and name in settings():
        return name
    near = difflib.get_close_matches(str(name), settings(), n=1)
    hint = f"did you mean '{near[0]}'?" if near else "docs/settings.md lists them all"
    raise ConfigError(f"{where}there is no setting '{name}'; {hint}")


def _explain(problem: Any) -> str:
    leaf = problem["loc"][1] if len(problem["loc"]) > 1 else problem["loc"][0]
    hint = "; YAML reads no as false: write fp32" if leaf == "mixed_precision" and problem["input"] is False else ""
    return f"{leaf}: {problem['msg'].removeprefix('Input ')}, not {problem['input']!r}{hint}"
