"""What is to be encoded, known before anything is: each record is named by all that decides its contents."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_utils.config.data import DataConfig
from lora_utils.data.dataset import find_examples
from lora_utils.data.findings import Finding
from lora_utils.data.inspection import InspectedExample, held_out_hashes, inspect_examples, require_training
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.vae import plan_encoding
from lora_utils.precompute.cache import record_key
from lora_utils.precompute.examples import Entry


@dataclass(frozen=True)
class Encoding:
    """What decides the contents of records besides the data."""

    text_dtype: torch.dtype
    """fp32, fp16 or bf16: what the U-Net computes in."""
    vae_dtype: torch.dtype
    """fp32, or fp16 for a VAE made for it."""

    @property
    def moments_dtype(self) -> torch.dtype:
        """fp16 where the U-Net computes in half precision; bf16 has too few digits for latents."""
        return torch.float32 if self.text_dtype == torch.float32 else torch.float16


@dataclass(frozen=True)
class DataPlan:
    """The data as it is now, and what its records will be called."""

    examples: list[InspectedExample]
    """What is to be encoded; an image may still turn out to be damaged."""
    entries: list[Entry]
    """One for each of them, in the same order."""
    findings: list[Finding]
    """What is known to be wrong already."""
    unconditional_key: str
    """Text record of what guidance steers away from when there is no negative prompt."""
    encoding: Encoding

    @property
    def visits_per_epoch(self) -> int:
        """How many looks at examples an epoch has."""
        return sum(entry.repeats for entry in self.entries if not entry.held_out)


def plan_data(base: PretrainedSdxl, config: DataConfig, encoding: Encoding) -> DataPlan:
    """Find and measure every example, and name its records; nothing is decoded or encoded.

    Raises:
        DataError: There is nothing to train on.
    """
    found_examples = find_examples(config)
    base.examine()  # before images are hashed
    examples, findings = inspect_examples(found_examples.examples, config)
    findings = found_examples.findings + findings
    # Said here: encoding may take an hour.
    require_training(examples, findings, config.validation_split)
    unconditional_key = record_key(unconditional=True, **_text_settings(base, config, encoding))
    entries = plan_entries(examples, base, config, encoding)
    return DataPlan(examples, entries, findings, unconditional_key, encoding)


def plan_entries(
    examples: Sequence[InspectedExample], base: PretrainedSdxl, config: DataConfig, encoding: Encoding
) -> list[Entry]:
    """Name every record that the examples need, after all that determines its contents."""
    held_out = held_out_hashes(examples, config.validation_split)
    vae = base.vae_identity()
    text_settings = _text_settings(base, config, encoding)
    precisions = [str(encoding.vae_dtype), str(encoding.moments_dtype)]
    entries = []
    for example in examples:
        shared = {
            "image": example.content_hash,
            "mask": example.mask_hash,
            "vae": vae,
            "precisions": precisions,
            # Of images with transparency alone: another colour need not encode the others anew.
            "background": config.alpha_background if example.has_alpha else None,
            "tile": plan_encoding(example.size, encoding.vae_dtype).tile_px,
        }
        entries.append(
            Entry(
                source=example.example.source,
                captions=example.captions,
                image_keys=tuple(record_key(**shared, crop=vars(crop)) for crop in example.crops),
                text_keys=tuple(record_key(caption=caption, **text_settings) for caption in example.captions),
                size=example.size,
                repeats=example.example.repeats,
                held_out=example.content_hash in held_out,
            )
        )
    return entries


def _text_settings(base: PretrainedSdxl, config: DataConfig, encoding: Encoding) -> dict[str, object]:
    return {
        "text": base.text_identity(),
        "dtype": str(encoding.text_dtype),
        "max_token_length": config.max_token_length,
    }
