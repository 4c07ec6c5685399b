"""Files that are no LoRA for this U-Net: what they are instead, by the names of their tensors."""

import re
from collections.abc import Collection, Mapping, Sequence

from lora_utils.model.lora_names import PREFIXES, plain_layer

# Adapters whose update is no product of two matrices. The endings are LyCORIS' and peft's.
_ADAPTERS = {
    "a LoHa": r"\.hada_[wt]\d",
    "a LoKr": r"\.lokr_[wt]\d",
    "a GLoRA": r"\.(a1|a2|b1|b2|bm)\.weight$",
    "an (IA)3": r"\.on_input$|\.ia3_",
    "a BOFT": r"\.boft_",
    "an OFT": r"\.oft_",
    "a VeRA": r"vera_lambda",
    "an AdaLoRA": r"\.lora_E\b",
    "a DyLoRA of LyCORIS": r"\.(up|down)_list\.",
    "a difference of whole weights": r"\.diff(_b)?$|\.set_weight$",
    "trained norms": r"\.[wb]_norm$",
}
_OTHERS = {
    "a checkpoint's adapter, without its strength; set lora_path to the run folder": r"^adapter\..*lora_",
    "a ControlNet-LLLite; set lora_path to a LoRA": r"^lllite_",
    "a ControlNet; set lora_path to a LoRA": r"lora_controlnet|^control(_model\.|net_)|^input_hint_block",
    "an IP-Adapter; set lora_path to a LoRA": r"^ip_adapter\.|^image_proj\.",
    "an embedding (textual inversion); set lora_path to a LoRA": (
        r"^emb_params$|^string_to_|^clip_[lg]$|^<.*>$"
    ),
    "a VAE; set lora_path to a LoRA": r"^(encoder|decoder|quant_conv|post_quant_conv)\.",
}
_LAYERS = re.compile(
    "(down|up|input|output)_blocks|mid(dle)?_block|conv_(in|out)|time_embed|(add|label)_emb|out_|first_stage_model"
)

# By the width of the texts that attention sees: the inputs of attn2's to_k and to_v.
_TEXT_WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    1280: "SDXL's refiner",
    2048: "SDXL",
}
_ARCHITECTURES = {
    "Flux": r"double_blocks|single_blocks|single_transformer_blocks",
    "Stable Diffusion 3": r"joint_blocks",
    "a transformer, not a U-Net": r"^(base_model\.model\.|diffusion_model\.)?(transformer|layers|blocks)\.",
}


def foreign_content(names: Collection[str], is_lora: bool) -> str | None:
    """What a file is, or holds besides a LoRA, that cannot be drawn; a clause with what to do next.

    Args:
        names: Of the tensors that are neither a LoRA's nor for another part of the pipeline.
        is_lora: Whether there are tensors of a LoRA too.
    """
    for description, pattern in _ADAPTERS.items():
        if name := _first(names, pattern):
            return (
                f"{'in part ' if is_lora else ''}{description} ({name:.120}), which is no LoRA and cannot be "
                "drawn here; choose a LoRA, or merge it into its base model with the program that made it"
            )
    for description, pattern in _OTHERS.items():
        if _first(names, pattern):
            return description

    weights = [
        name for name in names if name.endswith((".weight", ".bias")) and _LAYERS.match(plain_layer(name))
    ]
    if weights and is_lora:
        return f"in part whole weights of layers ({weights[0]:.120}); save the LoRA without them"
    if weights:
        return "a whole model, no LoRA; set pretrained_model_name_or_path to it, in diffusers' layout"
    unknown = [name for name in names if name.startswith(PREFIXES)]
    if unknown:
        return (
            f"in part of a sort that is not known here ({unknown[0]:.120}); choose another file as lora_path"
        )
    return None


def likely_base(shapes: Mapping[str, Sequence[int]], text_width: int) -> str | None:
    """The base model that a LoRA seems to be made for; None where nothing tells.

    Args:
        shapes: Of each layer's down half, by its name in the file.
        text_width: Of the texts that this base model's attention sees.
    """
    for name, shape in shapes.items():
        for architecture, pattern in _ARCHITECTURES.items():
            if re.search(pattern, name):
                return architecture
        if re.search(r"attn2[._](processor[._])?to_[kv]", name) and len(shape) > 1:
            if shape[1] == text_width:
                return "a relative of this with other blocks"
            return _TEXT_WIDTHS.get(shape[1])
    return None


def _first(names: Collection[str], pattern: str) -> str | None:
    return next((name for name in names if re.search(pattern, name)), None)
