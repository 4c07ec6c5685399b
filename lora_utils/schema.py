"""Every setting, once: name, type, bounds, default and help.

A run is described by one frozen ``RunConfig`` in sections. Leaf names are unique over the sections and are the flags
of diffusers' training scripts where those have one, else of sd-scripts. ``config`` reads and writes them.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lora_utils.data_config import DataConfig
from lora_utils.section import Fraction, Numbers, Section, Texts


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
    vae_precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the VAE while images are encoded; fp16 is for VAEs made for it, such as sdxl-vae-fp16-fix."""
    mixed_precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the U-Net; auto is fp32 on CPU, bf16 from sm_80 (A100, L4), fp16 below (T4)."""


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

    def total_steps(self, visits_per_epoch: int, processes: int = 1) -> int:
        """Optimiser updates in all: max_train_steps, or enough for num_train_epochs."""
        per_step = self.train_batch_size * self.gradient_accumulation_steps * processes
        return self.max_train_steps or math.ceil(self.num_train_epochs * visits_per_epoch / per_step)


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
