"""Every setting, once: name, type, bounds, default and help.

A run is described by one frozen ``RunConfig`` in sections. Leaf names are unique over the sections and are
the flags of diffusers' training scripts where those have one, else of sd-scripts. ``loading`` reads and
writes them.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, NonNegativeFloat, model_validator
from pydantic.fields import FieldInfo

from lora_utils.config.data import DataConfig
from lora_utils.config.run_name import NAMELESS, plain_name
from lora_utils.config.section import Location, NameOrPath, Section, Seeds, Texts
from lora_utils.config.training import CheckpointConfig, LoraConfig, TrainConfig

TIMESTEPS = 1000  # of SDXL's schedule; with more denoising steps its spacing comes out as 0
TINY = Path(__file__).parents[1] / "tiny"
RUNS = Path("runs")
"""Where run folders are made whose path nobody gives."""
BasePrecision = Literal["auto", "fp16", "int8", "nf4"]


class PathsConfig(Section):
    """Where things are written."""

    output_dir: Location | None = None
    """Run folder: weights, config, metrics, pictures; runs/<run_name>, then -2, -3, when not given."""
    run_name: Annotated[str, AfterValidator(plain_name)] | None = None
    """Names the run folder where output_dir does not; <data>-<preset> when not given."""
    precompute_dir: Location | None = None
    """Folder of precomputed moments and embeddings; precomputed in the run folder when not given."""
    infer_path: Location | None = None
    """Folder for compare's pictures; compare in the run folder when not given."""
    cache_dir: Location | None = None
    """Where downloaded models are kept; Hugging Face's own folder when not given."""

    @property
    def run_folder(self) -> Path:
        """Where the run is, or the first run of its name."""
        return self.output_dir or RUNS / (self.run_name or NAMELESS)

    @property
    def common_name(self) -> str:
        """What all runs of this name are called: the run folder's name, without the number that was added."""
        stem, _, number = self.run_folder.name.rpartition("-")
        is_numbered = stem == (self.run_name or NAMELESS) and number.isdecimal()
        return stem if is_numbered else self.run_folder.resolve().name

    @property
    def cache_folder(self) -> Path:
        """The run's cache: a folder of its own, or one that several runs share."""
        return self.precompute_dir or self.run_folder / "precomputed"


class ModelConfig(Section):
    """Which SDXL, in which precision."""

    pretrained_model_name_or_path: NameOrPath = "stabilityai/stable-diffusion-xl-base-1.0"
    """Hub id or local folder of the base model, in diffusers' layout; tiny is the small one that comes
    along.
    """
    pretrained_vae_model_name_or_path: NameOrPath | None = None
    """Another VAE, such as madebyollin/sdxl-vae-fp16-fix; the base model's own when not given."""
    revision: str | None = None
    """Branch, tag or commit of a base model on the Hub."""
    variant: str | None = None
    """Weight files to load, such as fp16; the plain ones when not given."""
    vae_precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the VAE that encodes images; fp16 is for VAEs made for it, such as sdxl-vae-fp16-fix."""
    mixed_precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the U-Net; auto is fp32 on CPU, bf16 from sm_80 (A100, L4), fp16 below (T4)."""
    base_precision: BasePrecision = "auto"
    """How the U-Net's frozen weights are kept: auto as mixed_precision; int8, nf4 save memory, not time."""

    @property
    def base(self) -> str:
        """Where the base model is: a Hub id or a folder. The word stays in what is written; a path would not
        travel.
        """
        name = self.pretrained_model_name_or_path
        return str(TINY) if name == "tiny" else name


class CompareConfig(Section):
    """Base model against LoRA on equal seeds."""

    lora_path: Location | None = None
    """LoRA file of any program, or a run folder, whose base and size it is drawn with; else the run."""
    prompt: Texts = ["a photo"]
    """One or more prompts."""
    negative_prompt: str | None = None
    """What to steer away from."""
    seeds: Seeds = [0]
    """Each prompt is drawn once per seed, with the same initial noise for base and LoRA."""
    adapter_scale: float = 1.0
    """Strength of the LoRA; 0 is the base model, and below 0 the other way."""
    num_inference_steps: Annotated[int, Field(ge=1, le=TIMESTEPS)] = 30
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
    checkpoint: CheckpointConfig = CheckpointConfig()
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _keeps_data_apart(self) -> "RunConfig":
        # Pictures that are drawn would lie among those that are learned, and a run's files look like data.
        data = {folder.resolve() for folder in self.data.train_data_dir or []}
        written = {"output_dir": self.paths.output_dir, "infer_path": self.paths.infer_path}
        for name, folder in written.items():
            if folder and folder.resolve() in data:
                raise ValueError(f"{name} and train_data_dir are both {folder}; set {name} to another folder")
        return self


@cache
def all_settings() -> dict[str, tuple[str, FieldInfo]]:
    """Every leaf name with its section and field."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {
        leaf: (section, field)
        for section, model in sections.items()
        if isinstance(model, type) and issubclass(model, BaseModel)
        for leaf, field in model.model_fields.items()
    }


def describe(field: FieldInfo) -> str:
    """What a setting does, on one line: the docstring below its field."""
    return " ".join(str(field.description).split())
