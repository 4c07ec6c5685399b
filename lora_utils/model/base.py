"""The only door to model files: the parts of an SDXL pipeline, one at a time.

A base model is a Hub id or a local folder in diffusers' layout. Weights are read from safetensors alone and go straight
to the device where they will stay: the host never holds a copy of a file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from lora_utils.config.schema import BasePrecision, ModelConfig
from lora_utils.model.files import ModelError, Part, explained, load
from lora_utils.model.quantisation import quantise_linears

PredictionType = Literal["epsilon", "v_prediction"]

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class NoiseSchedule:
    """What training needs to know of the base model's diffusion."""

    alphas_cumprod: Tensor
    """a_t for every timestep, (T,), fp32."""
    prediction_type: PredictionType
    scaling_factor: float
    """Latents are the VAE's output times this."""


class PretrainedSdxl:
    """Where the parts of the base model come from; every ``load_`` raises ModelError when it cannot.

    A ``device`` is where the weights go and stay: don't move them again.
    """

    def __init__(self, config: ModelConfig, cache_dir: Path | None = None) -> None:
        self.name = config.pretrained_model_name_or_path
        self.base_precision: BasePrecision = config.base_precision
        self._variant = config.variant
        self._source = {"revision": config.revision, "cache_dir": cache_dir}
        self._unet = Part(self.name, "unet", config.variant, self._source)
        self._vae = Part(self.name, "vae", config.variant, self._source)
        self._own_vae = config.pretrained_vae_model_name_or_path
        if self._own_vae:
            self._vae = Part(self._own_vae, "", None, {"cache_dir": cache_dir})

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> AutoencoderKL:
        """The VAE, in fp32 unless it was made for fp16: SDXL's own overflows there."""
        return self._vae.fill(self._vae.build(AutoencoderKL, self.vae_config()), dtype, device)

    def load_text_pipeline(self, dtype: torch.dtype, device: torch.device = CPU) -> StableDiffusionXLPipeline:
        """Tokenizers and text encoders in a pipeline without U-Net and VAE, for its ``encode_prompt``."""
        index = self._index()
        tokenizers = [
            load(CLIPTokenizer, self.name, subfolder=part, **self._source) for part in TEXT_PARTS[2:]
        ]
        if not all(map(_knows_words, tokenizers)):
            raise ModelError(
                f"{self.name} has a tokenizer without words; its vocab.json and merges.txt are missing"
            )
        encoders = (
            self._load_text_encoder(CLIPTextModel, TEXT_PARTS[0], dtype, device),
            self._load_text_encoder(CLIPTextModelWithProjection, TEXT_PARTS[1], dtype, device),
        )
        return self._assemble(index, **dict(zip(TEXT_PARTS, (*encoders, *tokenizers), strict=True)))

    def find_tokenizers(self) -> list[CLIPTokenizer] | None:
        """Both tokenizers, if they are on this machine already; nothing is downloaded."""
        options = {**self._source, "local_files_only": True}
        try:
            tokenizers = [
                load(CLIPTokenizer, self.name, subfolder=part, **options) for part in TEXT_PARTS[2:]
            ]
        except ModelError:
            return None
        return tokenizers if all(map(_knows_words, tokenizers)) else None

    def load_unet_pipeline(
        self, dtype: torch.dtype, device: torch.device = CPU, base_precision: BasePrecision = "auto"
    ) -> StableDiffusionXLPipeline:
        """U-Net and scheduler in a pipeline without encoders and VAE: embeddings in, latents out."""
        index = self._index()
        return self._assemble(index, unet=self._build_unet(dtype, device, base_precision))

    def load_noise_schedule(self) -> NoiseSchedule:
        """Noise levels and prediction type of the base model's scheduler.

        Raises:
            ModelError: The base predicts something that SDXL's LoRA training does not cover.
        """
        scheduler = self._load_scheduler(DDPMScheduler)
        kind = scheduler.config["prediction_type"]
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"{self.name} predicts '{kind}'; choose a base that predicts epsilon or v_prediction"
            )
        scaling_factor = self.vae_config().get("scaling_factor", 0.18215)  # diffusers' default
        return NoiseSchedule(scheduler.alphas_cumprod.float(), kind, scaling_factor)

    def vae_config(self) -> dict[str, Any]:
        """The VAE's config.json, without its weights.

        Raises:
            ModelError: It normalises latents in a way that SDXL's pipelines train without.
        """
        config = self._vae.config(AutoencoderKL)
        if config.get("latents_mean") is not None:
            raise ModelError(
                f"the VAE of {self.name} shifts its latents (latents_mean); choose a VAE without"
            )
        return config

    def vae_scale_factor(self) -> int:
        """Pixels to a latent: 8 in SDXL."""
        config = self.vae_config()
        return explained(self.name, lambda: 2 ** (len(config["block_out_channels"]) - 1))

    def load_unet(
        self, dtype: torch.dtype, device: torch.device = CPU, base_precision: BasePrecision = "auto"
    ) -> UNet2DConditionModel:
        """The U-Net alone, frozen.

        Args:
            dtype: What it computes in.
            device: Where its weights go, tensor by tensor.
            base_precision: How its transformers' linears are kept; all the rest is in ``dtype``.
        """
        return self._build_unet(dtype, device, base_precision)

    def unet_identity(self) -> str:
        """What identifies the U-Net's weights: hashes of a folder's files, or the commit on the Hub."""
        return f"{self._variant} {self._unet.identity()}"

    def vae_identity(self) -> str:
        """What identifies the VAE's weights: hashes of a folder's files, or the commit on the Hub."""
        return self._vae.identity() if self._own_vae else f"{self._variant} {self._vae.identity()}"

    def text_identity(self) -> str:
        """What identifies tokenizers and text encoders, likewise, and what stands for no prompt."""
        zeros = self._index().get("force_zeros_for_empty_prompt", True)
        parts = [Part(self.name, part, self._variant, self._source) for part in TEXT_PARTS]
        names = ["tokenizer_config.json" if "tokenizer" in part else "config.json" for part in TEXT_PARTS]
        identities = [part.identity(name) for part, name in zip(parts, names, strict=True)]
        return " ".join([str(self._variant), f"zeros={zeros}", *identities])

    def _build_unet(
        self, dtype: torch.dtype, device: torch.device, base_precision: BasePrecision
    ) -> UNet2DConditionModel:
        if base_precision == "fp16" and dtype != torch.float16:
            raise ModelError(
                f"base_precision=fp16 goes with a U-Net that computes in fp16, and this one computes in {dtype}; "
                "set base_precision to auto, or mixed_precision to fp16"
            )
        config = self._unet.config(UNet2DConditionModel)
        if "quantization_config" in config:
            raise ModelError(
                f"{self.name} holds quantised weights; choose the plain model and base_precision=nf4"
            )
        unet = self._unet.build(UNet2DConditionModel, config)
        if base_precision in ("int8", "nf4"):
            # Transformers alone: 86 % of the weights. Embeddings are small and sensitive.
            names = [name for name, part in unet.named_modules() if isinstance(part, nn.Linear)]
            quantise_linears(unet, [name for name in names if ".attentions." in name], base_precision, dtype)
        return self._unet.fill(unet, dtype, device)

    def _load_text_encoder(
        self, kind: type[PreTrainedModel], part: str, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        Part(self.name, part, self._variant, self._source).plain_config()
        encoder, found = load(
            kind,
            self.name,
            subfolder=part,
            dtype=dtype,
            device_map={"": device},
            variant=self._variant,
            use_safetensors=True,
            attn_implementation="sdpa",  # config.json could name a kernel on the Hub, which would run
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are found just below, by name
            **self._source,
        )
        # transformers 4 names what does not fit, 5 adds the shapes.
        mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
        if wrong := [*found["missing_keys"], *mismatched]:
            raise ModelError(
                f"cannot load {self.name}: the files of {part} do not fit it: {', '.join(wrong[:3])}"
            )
        return encoder

    def _index(self) -> dict[str, Any]:
        """model_index.json."""
        index = explained(self.name, lambda: StableDiffusionXLPipeline.load_config(self.name, **self._source))
        kind = index.get("_class_name") if isinstance(index, dict) else None
        if not isinstance(kind, str) or not kind.startswith("StableDiffusionXL"):
            raise ModelError(
                f"{self.name} is {kind!s:.60} to its model_index.json, not SDXL; choose an SDXL base model"
            )
        return index

    def _assemble(self, index: dict[str, Any], **parts: Any) -> StableDiffusionXLPipeline:
        """A pipeline of these parts alone; diffusers' ``from_pretrained`` would run what model_index.json names."""
        named = index.get("scheduler")
        library, name = named if isinstance(named, list) and len(named) == 2 else (None, None)
        kind = getattr(diffusers, str(name), None) if library == "diffusers" else None
        if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
            raise ModelError(
                f"{self.name} names {named!s:.60}, no scheduler of diffusers'; choose another base model"
            )
        pipeline = StableDiffusionXLPipeline(
            **dict.fromkeys(("unet", "vae", *TEXT_PARTS)) | parts,
            scheduler=self._load_scheduler(kind),
            force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load_scheduler(self, kind: Any) -> Any:
        config = Part(self.name, "scheduler", None, self._source).config(kind)
        return explained(self.name, lambda: kind.from_config(config))


def _knows_words(tokenizer: CLIPTokenizer) -> bool:
    """False of the empty tokenizer that transformers 5 makes of files that are not there, without a word."""
    return len(tokenizer) >= 2 * 256  # every byte, alone and at the end of a word
