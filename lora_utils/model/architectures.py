"""SDXL's shapes (Podell et al., 2023), for forecasts that are made before anything is downloaded.

Keys are those of config.json, diffusers' and transformers'; what is not named has their default.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lora_utils.config.schema import ModelConfig

UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "sample_size": 1024,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "act_fn": "silu",
    "scaling_factor": 0.13025,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
TEXT_ENCODER_2: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class Architecture:
    """Shapes of a base model's parts, as their config.json has them."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], dict[str, Any]]
    is_assumed: bool = False
    """Nothing of it is on this machine, and SDXL's own are taken."""
    is_local: bool = False
    """A folder: nothing is downloaded."""

    @property
    def scale_factor(self) -> int:
        """Pixels to a latent."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)


def find_architecture(config: ModelConfig, cache_dir: Path | None) -> Architecture:
    """The base model's shapes, from its folder or from what was downloaded before; nothing is downloaded.

    Args:
        config: Names the base model, and perhaps a VAE of its own.
        cache_dir: Where downloads are kept; Hugging Face's own folder when not given.

    Returns:
        SDXL's own shapes for each part that is not here.
    """
    name = config.base
    own_vae = config.pretrained_vae_model_name_or_path

    def read(part: str) -> dict[str, Any] | None:
        return _read(name, f"{part}/config.json", cache_dir, config.revision)

    unet = read("unet")
    first = read("text_encoder")
    second = read("text_encoder_2")
    vae = _read(own_vae, "config.json", cache_dir, None) if own_vae else read("vae")
    return Architecture(
        unet or UNET,
        vae or VAE,
        (first or TEXT_ENCODER, second or TEXT_ENCODER_2),
        is_assumed=unet is None,  # the U-Net decides: its step is what has to fit
        is_local=Path(name).is_dir(),
    )


def _read(name: str, filename: str, cache_dir: Path | None, revision: str | None) -> dict[str, Any] | None:
    if Path(name).is_dir():
        file = Path(name, filename)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    try:
        cached = try_to_load_from_cache(name, filename, cache_dir=cache_dir, revision=revision)
    except HFValidationError:  # loading will explain it
        return None
    # Else None, or a mark that the Hub has no such file.
    return json.loads(Path(cached).read_text(encoding="utf-8")) if isinstance(cached, str) else None
