"""The only door to model files: the parts of an SDXL pipeline, one at a time.

A base model is a Hub id or a local folder in diffusers' layout. Weights are read from safetensors alone.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from lora_utils import UserError
from lora_utils.diffusion import PredictionType
from lora_utils.files import file_hash
from lora_utils.schema import ModelConfig

Loaded = TypeVar("Loaded")
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class ModelError(UserError):
    """A base model cannot be found, read or used."""


@dataclass(frozen=True)
class NoiseSchedule:
    """What training needs to know of the base model's diffusion."""

    alphas_cumprod: Tensor
    """a_t for every timestep, (T,), fp32."""
    prediction_type: PredictionType
    scaling_factor: float
    """Latents are the VAE's output times this."""


class BaseModel:
    """Where the parts of the base model come from; every ``load_`` raises ModelError when it cannot."""

    def __init__(self, config: ModelConfig, cache_dir: Path | None = None) -> None:
        self.name = config.pretrained_model_name_or_path
        self.vae_name = config.pretrained_vae_model_name_or_path
        self._variant = config.variant
        self._source = {"revision": config.revision, "cache_dir": cache_dir}
        self._vae_source = {"cache_dir": cache_dir}

    def load_vae(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
        """The VAE, in fp32 unless it was made for fp16: SDXL's own overflows there."""
        options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
        if self.vae_name:
            return _load(AutoencoderKL, self.vae_name, **options, **self._vae_source)
        return _load(AutoencoderKL, self.name, subfolder="vae", variant=self._variant, **options, **self._source)

    def load_text_pipeline(self, dtype: torch.dtype) -> StableDiffusionXLPipeline:
        """Tokenizers and text encoders in a pipeline without U-Net and VAE, for its ``encode_prompt``."""
        pipeline = self._load_pipeline(dtype, absent=("unet", "vae"))
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            if not _knows_words(tokenizer):
                raise ModelError(
                    f"{self.name} has a tokenizer without words; its vocab.json and merges.txt are missing"
                )
        return pipeline

    def find_tokenizers(self) -> list[CLIPTokenizer] | None:
        """Both tokenizers, if they are on this machine already; nothing is downloaded."""
        options = {**self._source, "local_files_only": True}
        try:
            tokenizers = [_load(CLIPTokenizer, self.name, subfolder=part, **options) for part in TEXT_PARTS[2:]]
        except ModelError:
            return None
        return tokenizers if all(map(_knows_words, tokenizers)) else None

    def load_unet_pipeline(self, dtype: torch.dtype) -> StableDiffusionXLPipeline:
        """U-Net and scheduler in a pipeline without encoders and VAE: embeddings in, latents out."""
        return self._load_pipeline(dtype, absent=("vae", *TEXT_PARTS))

    def load_noise_schedule(self) -> NoiseSchedule:
        """Noise levels and prediction type of the base model's scheduler.

        Raises:
            ModelError: The base predicts something that SDXL's LoRA training does not cover.
        """
        scheduler = _load(DDPMScheduler, self.name, subfolder="scheduler", **self._source)
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(f"{self.name} predicts '{kind}'; choose a base that predicts epsilon or v_prediction")
        scaling_factor = self.vae_config().get("scaling_factor", 0.18215)  # diffusers' default
        return NoiseSchedule(scheduler.alphas_cumprod.float(), kind, scaling_factor)

    def vae_config(self) -> dict[str, Any]:
        """The VAE's config.json, without its weights.

        Raises:
            ModelError: It normalises latents in a way that SDXL's pipelines train without.
        """
        if self.vae_name:
            config = _explained(self.vae_name, lambda: AutoencoderKL.load_config(self.vae_name, **self._vae_source))
        else:
            config = _explained(
                self.name, lambda: AutoencoderKL.load_config(self.name, subfolder="vae", **self._source)
            )
        if config.get("latents_mean") is not None:
            raise ModelError(f"the VAE of {self.name} shifts its latents (latents_mean); choose a VAE without")
        return config

    def vae_scale_factor(self) -> int:
        """Pixels to a latent: 8 in SDXL."""
        return 2 ** (len(self.vae_config()["block_out_channels"]) - 1)

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """The U-Net alone."""
        options: dict[str, Any] = {"torch_dtype": dtype, "variant": self._variant, "use_safetensors": True}
        return _load(UNet2DConditionModel, self.name, subfolder="unet", **options, **self._source)

    def vae_identity(self) -> str:
        """What identifies the VAE's weights: hashes of a folder's files, or the commit on the Hub."""
        if self.vae_name:
            return _identity(self.vae_name, "", "config.json", self._vae_source)
        return f"{self._variant} " + _identity(self.name, "vae", "config.json", self._source)

    def text_identity(self) -> str:
        """What identifies tokenizers and text encoders, likewise, and what stands for no prompt."""
        index = _explained(self.name, lambda: StableDiffusionXLPipeline.load_config(self.name, **self._source))
        zeros = index.get("force_zeros_for_empty_prompt", True)
        names = [(part, "tokenizer_config.json" if "tokenizer" in part else "config.json") for part in TEXT_PARTS]
        parts = [_identity(self.name, part, config, self._source) for part, config in names]
        return " ".join([str(self._variant), f"zeros={zeros}", *parts])

    def _load_pipeline(self, dtype: torch.dtype, absent: tuple[str, ...]) -> StableDiffusionXLPipeline:
        pipeline = _load(
            StableDiffusionXLPipeline,
            self.name,
            torch_dtype=dtype,
            variant=self._variant,
            use_safetensors=True,
            add_watermarker=False,
            **dict.fromkeys(absent),
            **self._source,
        )
        if not isinstance(pipeline, StableDiffusionXLPipeline):
            raise ModelError(f"{self.name} is a {type(pipeline).__name__}, not SDXL; choose an SDXL base model")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _knows_words(tokenizer: CLIPTokenizer) -> bool:
    """False of the empty tokenizer that transformers 5 makes of files that are not there, without a word."""
    return len(tokenizer) >= 2 * 256  # every byte, alone and at the end of a word


def _load(kind: Callable[..., Loaded] | Any, name: str, **options: Any) -> Loaded:
    return _explained(name, lambda: kind.from_pretrained(name, **options))


def _identity(name: str, part: str, config: str, source: dict[str, Any]) -> str:
    folder = Path(name, part)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt"))
        return " ".join(file_hash(path) for path in files)
    filename = f"{part}/{config}" if part else config
    path = Path(_explained(name, lambda: hf_hub_download(name, filename, **source)))
    return f"{name}@{path.parents[filename.count('/')].name}"  # .../snapshots/<commit>/<filename>


def _explained(name: str, load: Callable[[], Loaded]) -> Loaded:
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ModelError(
            f"there is no folder {name}; give a folder in diffusers' layout or a Hub id such as owner/name"
        )
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # From 0.42 the word is dtype, which diffusers 0.39 would ignore without a word.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            return load()
    except (OSError, HfHubHTTPError, HFValidationError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot load {name}: {reason} (check pretrained_model_name_or_path, variant and the connection)"
        ) from error
