"""Base models and adapters that somebody made to harm: changes of the tiny SDXL's files and of an adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.faults.malicious import CODE, DEEP, FORMS, PIPE
from tests.conftest import TINY

UNET = "unet/diffusion_pytorch_model.safetensors"
UNET_INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
TEXT = "text_encoder/model.safetensors"
TEXT_CONFIG = "text_encoder/config.json"
PARTS = "model_index.json"
NOISE = "scheduler/scheduler_config.json"
ADAPTED = {"peft_type": "LORA", "base_model_name_or_path": "x", "target_modules": ["q_proj"], "r": 2}
ADAPTED |= {"megatron_config": {"a": 1}, "megatron_core": "payload_module"}


def index_of(shard: object) -> bytes:
    """An index that names one shard."""
    return json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": shard}}).encode()


REFUSED: dict[str, dict[str, Any]] = {
    **{f"a U-Net ({form})": {UNET: None, "unet/diffusion_pytorch_model.bin": form} for form in FORMS},
    **{f"a U-Net under a good name ({form})": {UNET: form} for form in FORMS},
    **{f"a text encoder ({form})": {TEXT: None, "text_encoder/pytorch_model.bin": form} for form in FORMS},
    "a text encoder under a good name": {"text_encoder_2/model.safetensors": "torch.save"},
    "a VAE": {
        "vae/diffusion_pytorch_model.safetensors": None, "vae/diffusion_pytorch_model.bin": "torch.save"},
    "a shard": {UNET: None, "unet/x.bin": "torch.save", UNET_INDEX: index_of("x.bin")},
    "a text encoder's shard": {
        TEXT: None, "text_encoder/x.bin": "torch.save",
        "text_encoder/model.safetensors.index.json": index_of("x.bin")},
    "an adapter of the text encoder": {
        "text_encoder/adapter_config.json": json.dumps(ADAPTED).encode(),
        "text_encoder/adapter_model.bin": "pickle"},
    "a class of a pipeline": {"own.py": CODE, PARTS: {"_class_name": ["own", "P"]}},
    "a class of a scheduler": {"scheduler/own.py": CODE, PARTS: {"scheduler": ["own", "P"]}},
    "an installed module as scheduler": {
        "../payload_module.py": CODE, PARTS: {"scheduler": ["payload_module", "P"]}},
    "a function as scheduler": {PARTS: {"scheduler": ["os", "system"]}},
    "a vocabulary": {"tokenizer/vocab.json": "pickle", "tokenizer/tokenizer.json": "pickle"},
    "settings": {"unet/config.json": "pickle"},
    "an index": {UNET_INDEX: "pickle"},
    "an index of the pipeline": {PARTS: "pickle"},
    "the noise": {NOISE: "pickle"},
    "weights elsewhere": {UNET_INDEX: index_of("../../x.safetensors")},
    "weights at the root": {UNET_INDEX: index_of("/x.safetensors")},
    "weights that are a number": {UNET_INDEX: index_of(1)},
    "an index that is a list": {UNET_INDEX: b"[1]"},
    "a pipeline that is a list": {PARTS: b"[]"},
    "quantised weights": {TEXT_CONFIG: {"quantization_config": {"quant_method": "awq", "bits": 4}}},
    **{f"a nesting of 100,000 in {name}": {name: DEEP.encode()}
       for name in (PARTS, "unet/config.json", TEXT_CONFIG)},
    "a nesting of 100,000 in an index": {UNET_INDEX: DEEP.encode()},
    "10**9 layers": {"unet/config.json": {"layers_per_block": 10**9}},
    "10**9 layers in a list": {"unet/config.json": {"transformer_layers_per_block": [[10**9]]}},
    "10**9 layers of text": {TEXT_CONFIG: {"num_hidden_layers": 10**9}},
    "10**400 channels": {"vae/config.json": {"latent_channels": 10**400}},
    "a list of 10**5 blocks": {"unet/config.json": {"block_out_channels": [32] * 10**5}},
    "10**12 timesteps": {NOISE: {"num_train_timesteps": 10**12}},
    "a number that is text": {"unet/config.json": {"layers_per_block": "all"}},
    "a list that is a number": {"vae/config.json": {"block_out_channels": 3}},
    "no channels": {"unet/config.json": {"block_out_channels": [0, 0, 0]}},
    "a width that is text": {TEXT_CONFIG: {"hidden_size": "x"}},
    "an unknown noise": {NOISE: {"beta_schedule": "x"}},
    **{f"a pipe as {name}": {name: PIPE} for name in (UNET, TEXT, TEXT_CONFIG, "unet/config.json", PARTS)},
}  # fmt: skip
PASSED_OVER: dict[str, dict[str, Any]] = {
    "a file that older libraries run": {"None.py": CODE},
    "a pipeline of its own": {"pipeline.py": CODE, PARTS: {"custom_pipeline": "pipeline"}},
    "parts of its own": {
        **{f"{part}/own.py": CODE for part in ("unet", "vae", "tokenizer", "text_encoder")},
        PARTS: {part: ["own", "P"] for part in ("unet", "vae", "tokenizer", "text_encoder")}},
    "a map to classes": {
        **{f"{part}/own.py": CODE for part in ("unet", "vae", "text_encoder")},
        **{f"{part}/config.json": {"auto_map": {"AutoModel": "own.P", "AutoConfig": "own.P"}}
           for part in ("unet", "vae", "text_encoder")}},
    "a tokenizer of its own": {
        "tokenizer/own.py": CODE, PARTS: {"tokenizer": ["transformers", "AutoTokenizer"]},
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "P", "auto_map": {"AutoTokenizer": ["own.P", "own.P"]}}},
    "a pipe as an index": {UNET_INDEX: PIPE},
    "a kernel on the Hub": {TEXT_CONFIG: {"attn_implementation": "a/b", "_attn_implementation": "a/b"}},
    "pickles beside the weights": {
        "unet/diffusion_pytorch_model.bin": "torch.save", "text_encoder/pytorch_model.bin": "torch.save"},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "a module to import": {"megatron_config": {"a": 1}, "megatron_core": "payload_module"},
    "patterns that never end": {
        "target_modules": "(.+)+!",
        "exclude_modules": "(.+)+!",
        "rank_pattern": {"(.+)+!": 2},
    },
    "alphas that never end": {"alpha_pattern": {"(.+)+!": 2}},
    "more alphas than layers": {"alpha_pattern": {f"a{number}": 1 for number in range(10_000)}},
    "a rank of 10**9": {"r": 10**9, "rank_pattern": {"to_q": 10**9}},
    "an alpha that is NaN": {"lora_alpha": float("nan")},
    "an alpha that is a list": {"lora_alpha": []},
    "a start that takes hours": {"init_lora_weights": "pissa_niter_100000"},
    "layers to copy": {"layer_replication": [[0, 10**6]]},
    "names of Python's own": {"__class__": "os.system", "auto_mapping": {"parent_library": "payload_module"}},
}
NEITHER: dict[str, torch.Tensor | None] = dict.fromkeys(("down", "up"))
TENSORS: dict[str, dict[str, torch.Tensor | None]] = {
    "one dimension": {"down": torch.ones(64)},
    "no dimension": {"down": torch.tensor(1.0)},
    "an up for another layer": {"up": torch.ones(3, 2)},
    "an up of another rank": {"up": torch.ones(64, 5)},
    "no numbers": {"down": torch.full((2, 64), float("nan"))},
    "no rank": {"down": torch.ones(0, 64), "up": torch.ones(64, 0)},
    "another kind of adapter": NEITHER | {"unet.y.lokr_w1": torch.ones(2, 2)},
    "kohya's names, no layer's": NEITHER | {"lora_unet_x.lora_down.weight": torch.ones(2, 2)},
    "kohya's names, no block's": NEITHER | {"lora_unet_input_blocks_x_y.lora_down.weight": torch.ones(2, 2)},
    "kohya's names, many alphas": NEITHER
    | {
        "lora_unet_down_blocks_1_x.lora_down.weight": torch.ones(2, 2),
        "lora_unet_down_blocks_1_x.alpha": torch.ones(3),
    },
}


def base_model(folder: Path) -> Path:
    """A copy of the tiny SDXL that may be spoilt."""
    return Path(shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def adapter_file(file: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Path:
    """A LoRA of one layer of the tiny U-Net, whose tensors ``down`` and ``up`` may be given."""
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    width = json.loads((TINY / "unet" / "config.json").read_text())["block_out_channels"][1]
    whole = {"down": torch.ones(2, width), "up": torch.ones(width, 2)} | tensors
    names = {"down": layer.format("A"), "up": layer.format("B")}
    save_file(
        {names.get(name, name): tensor for name, tensor in whole.items() if tensor is not None},
        file,
        metadata,
    )
    return file


def peft_metadata(**changes: object) -> dict[str, str]:
    """What diffusers writes into an adapter's file about it, but for the changes."""
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"]} | changes
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}
