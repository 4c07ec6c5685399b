"""The base model: the parts of an SDXL pipeline, loaded one at a time.

A base model is a Hub id or a local folder in diffusers' layout. Weights are read from safetensors alone and
go straight to the device where they will stay: the host never holds a copy of a file.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

from lora_utils.config.schema import BasePrecision, ModelConfig
from lora_utils.model.examination import (
    ModelError,
    examine,
    refuse_other_prediction,
    refuse_other_unet,
    refuse_other_vae,
)
from lora_utils.model.files import Part, explained
from lora_utils.model.pipelines import TEXT_PARTS, PipelineFiles
from lora_utils.model.quantisation import quantise_linears, transformer_linears

CPU = torch.device("cpu")
DIFFUSERS_SCALING_FACTOR = 0.18215  # what AutoencoderKL takes where a config.json does not say
PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """What training needs to know of the base model's diffusion."""

    alphas_cumprod: Tensor
    """Share of the signal's variance that is left at every timestep, (T,), fp32."""
    prediction_type: PredictionType
    """What the U-Net was trained to predict."""
    scaling_factor: float
    """Latents are the VAE's output times this."""

    def to(self, device: torch.device) -> "NoiseSchedule":
        """The same on a device, so that no step has to copy it."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))


class PretrainedSdxl:
    """Where the parts of the base model come from; every ``load_`` raises ModelError when it cannot.

    A ``device`` is where the weights go and stay: don't move them again.
    """

    def __init__(self, config: ModelConfig, cache_dir: Path | None = None) -> None:
        self.name = config.base
        self.base_precision: BasePrecision = config.base_precision
        self._config = config
        self._cache_dir = cache_dir
        self._variant = config.variant
        self._source = {"revision": config.revision, "cache_dir": cache_dir}
        self._files = PipelineFiles(self.name, config.variant, self._source)
        self._unet_identity: str | None = None
        self._unet = Part(self.name, "unet", config.variant, self._source)
        self._vae = Part(self.name, "vae", config.variant, self._source)

        # A VAE of its own is a whole repository of one part, without the base model's variant and revision.
        self._own_vae = config.pretrained_vae_model_name_or_path
        if self._own_vae:
            self._vae = Part(self._own_vae, "", None, {"cache_dir": cache_dir})

    def examine(self) -> None:
        """Refuse what no stage could use, before anything is loaded; raises as ``examination.examine``."""
        examine(self._config, self._cache_dir)

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> AutoencoderKL:
        """The VAE, in fp32 unless it was made for fp16: SDXL's own overflows there."""
        return self._vae.fill(self._vae.build(AutoencoderKL, self.vae_config()), dtype, device)

    def load_text_pipeline(self, dtype: torch.dtype, device: torch.device = CPU) -> StableDiffusionXLPipeline:
        """Tokenizers and text encoders in a pipeline without U-Net and VAE, for its ``encode_prompt``."""
        index = self._files.index()
        tokenizers = self._files.load_tokenizers()
        encoders = self._files.load_text_encoders(dtype, device)
        return self._files.assemble(index, **dict(zip(TEXT_PARTS, [*encoders, *tokenizers], strict=True)))

    def find_tokenizers(self) -> list[CLIPTokenizer] | None:
        """Both tokenizers, if they are on this machine already; nothing is downloaded."""
        return self._files.find_tokenizers()

    def load_unet(
        self, dtype: torch.dtype, device: torch.device = CPU, base_precision: BasePrecision = "auto"
    ) -> UNet2DConditionModel:
        """The U-Net alone, frozen.

        Args:
            dtype: What it computes in.
            device: Where its weights go, tensor by tensor.
            base_precision: How its transformers' linears are kept; all the rest is in ``dtype``.

        Raises:
            ModelError: It cannot be loaded, or not in this precision.
            QuantisationError: bitsandbytes is not installed, and int8 or nf4 needs it.
        """
        if base_precision == "fp16" and dtype != torch.float16:
            raise ModelError(
                "base_precision=fp16 goes with a U-Net that computes in fp16, and this one computes in "
                f"{dtype}; set base_precision to auto, or mixed_precision to fp16"
            )
        config = self._unet.config(UNet2DConditionModel)
        refuse_other_unet(self.name, config)
        unet = self._unet.build(UNet2DConditionModel, config)
        if base_precision in ("int8", "nf4"):
            quantise_linears(unet, list(transformer_linears(unet)), base_precision, dtype)
        return self._unet.fill(unet, dtype, device)

    def load_unet_pipeline(
        self, dtype: torch.dtype, device: torch.device = CPU, base_precision: BasePrecision = "auto"
    ) -> StableDiffusionXLPipeline:
        """U-Net and scheduler in a pipeline without encoders and VAE: embeddings in, latents out."""
        index = self._files.index()
        return self._files.assemble(index, unet=self.load_unet(dtype, device, base_precision))

    def load_noise_schedule(self) -> NoiseSchedule:
        """Noise levels and prediction type of the base model's scheduler.

        Raises:
            ModelError: The base predicts something that SDXL's LoRA training does not cover.
        """
        # Whatever sampler the base names: training knows timesteps as DDPM does (Ho et al., 2020).
        scheduler = self._files.load_scheduler(DDPMScheduler)
        prediction_type = scheduler.config["prediction_type"]
        refuse_other_prediction(self.name, prediction_type)
        scaling_factor = self.vae_config().get("scaling_factor", DIFFUSERS_SCALING_FACTOR)
        return NoiseSchedule(scheduler.alphas_cumprod.float(), prediction_type, scaling_factor)

    def vae_config(self) -> dict[str, Any]:
        """The VAE's config.json, without its weights.

        Raises:
            ModelError: It normalises latents in a way that SDXL's pipelines train without.
        """
        config = self._vae.config(AutoencoderKL)
        refuse_other_vae(self.name, config)
        return config

    def vae_scale_factor(self) -> int:
        """Pixels to a latent: 8 in SDXL."""
        config = self.vae_config()
        return explained(self.name, lambda: 2 ** (len(config["block_out_channels"]) - 1))

    def unet_identity(self) -> str:
        """What identifies the U-Net's weights: hashes of a folder's files, or the commit on the Hub."""
        if self._unet_identity is None:  # of gigabytes: hashed once
            self._unet_identity = f"{self._variant} {self._unet.identity()}"
        return self._unet_identity

    def vae_identity(self) -> str:
        """What identifies the VAE's weights: hashes of a folder's files, or the commit on the Hub."""
        return self._vae.identity() if self._own_vae else f"{self._variant} {self._vae.identity()}"

    def text_identity(self) -> str:
        """What identifies tokenizers and text encoders, likewise, and what stands for no prompt."""
        zeros = self._files.index().get("force_zeros_for_empty_prompt", True)
        identities = []
        for name in TEXT_PARTS:
            # On the Hub any file of a part tells the commit; this is one that every such part has.
            config = "tokenizer_config.json" if "tokenizer" in name else "config.json"
            identities.append(Part(self.name, name, self._variant, self._source).identity(config))
        return " ".join([str(self._variant), f"zeros={zeros}", *identities])
