"""SDXL pipelines put together by hand, of the parts that a stage needs.

diffusers' own ``from_pretrained`` would load everything at once, and import and run whatever classes the base
model's model_index.json names. Here that file may choose among diffusers' schedulers, and nothing else.
"""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from lora_utils.model.examination import ModelError, refuse_other_pipeline
from lora_utils.model.files import Part, explained, load

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXT_PARTS = TEXT_ENCODERS + TOKENIZERS
PROBED_TOKENS = 64  # of a vocabulary, to see whether it encodes its own words


@dataclass(frozen=True)
class PipelineFiles:
    """A base model's index, scheduler, tokenizers and text encoders; all methods raise ModelError."""

    name: str
    """Hub id or folder."""
    variant: str | None
    """Infix of the weight files' names, such as fp16."""
    source: dict[str, Any]
    """cache_dir and revision, as Hugging Face's loaders take them."""

    def index(self) -> dict[str, Any]:
        """model_index.json of an SDXL pipeline."""
        index = explained(self.name, lambda: StableDiffusionXLPipeline.load_config(self.name, **self.source))
        refuse_other_pipeline(self.name, index)
        return index

    def load_scheduler(self, scheduler_class: Any) -> Any:
        """The base model's noise levels in one of diffusers' schedulers."""
        config = Part(self.name, "scheduler", None, self.source).config(scheduler_class)
        return explained(self.name, lambda: scheduler_class.from_config(config))

    def load_tokenizers(self) -> list[CLIPTokenizer]:
        """Both tokenizers, with all their words."""
        tokenizers = self._read_tokenizers(self.source)
        if not all(map(_knows_words, tokenizers)):
            raise ModelError(
                f"{self.name} has a tokenizer without words; its vocab.json and merges.txt are missing"
            )
        return tokenizers

    def find_tokenizers(self) -> list[CLIPTokenizer] | None:
        """Both tokenizers, if they are on this machine already; nothing is downloaded."""
        try:
            tokenizers = self._read_tokenizers({**self.source, "local_files_only": True})
        except ModelError:
            return None
        return tokenizers if all(map(_knows_words, tokenizers)) else None

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device) -> list[PreTrainedModel]:
        """CLIP ViT-L, then OpenCLIP ViT-bigG with its projection, which gives the pooled embedding."""
        return [
            self._load_text_encoder(CLIPTextModel, TEXT_ENCODERS[0], dtype, device),
            self._load_text_encoder(CLIPTextModelWithProjection, TEXT_ENCODERS[1], dtype, device),
        ]

    def assemble(self, index: dict[str, Any], **parts: Any) -> StableDiffusionXLPipeline:
        """A pipeline of these parts and the scheduler; every other part is None.

        Args:
            index: From ``index``, which the caller reads first, so that a wrong model is refused before
                gigabytes of it are loaded.
            parts: By diffusers' names: unet, text_encoder, tokenizer and so on.
        """
        entry = index.get("scheduler")
        library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        # Looked up in diffusers alone: importing the library that the file names would run its code.
        scheduler_class = getattr(diffusers, str(name), None) if library == "diffusers" else None
        if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
            raise ModelError(
                f"{self.name} names {entry!s:.60}, no scheduler of diffusers'; choose another base model"
            )

        pipeline = StableDiffusionXLPipeline(
            **dict.fromkeys(("unet", "vae", *TEXT_PARTS)) | parts,
            scheduler=self.load_scheduler(scheduler_class),
            force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
            add_watermarker=False,  # where the package is installed, diffusers would mark every image
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _read_tokenizers(self, options: dict[str, Any]) -> list[CLIPTokenizer]:
        return [load(CLIPTokenizer, self.name, subfolder=part, **options) for part in TOKENIZERS]

    def _load_text_encoder(
        self, encoder_class: type[PreTrainedModel], part: str, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        # Before transformers reads anything: it would follow a config to adapters and other libraries.
        Part(self.name, part, self.variant, self.source).plain_config()
        encoder, report = load(
            encoder_class,
            self.name,
            subfolder=part,
            dtype=dtype,
            device_map={"": device},  # tensor by tensor to the device, without a copy on the host
            variant=self.variant,
            use_safetensors=True,
            attn_implementation="sdpa",  # config.json could name a kernel on the Hub, which would run
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named just below, all of them
            **self.source,
        )

        # transformers 4 names what does not fit, 5 adds the shapes.
        mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
        unfit = [*report["missing_keys"], *mismatched]
        if unfit:  # transformers would go on with random weights in their place
            raise ModelError(
                f"cannot load {self.name}: the files of {part} do not fit it: {', '.join(unfit[:3])}"
            )
        return encoder


def _knows_words(tokenizer: CLIPTokenizer) -> bool:
    """False of the empty tokenizer that transformers 5 makes of files that are not there, without a word.

    By what it does, not by its size: a small vocabulary is good if it encodes its own words.
    """
    special = set(tokenizer.all_special_ids)
    words = [number for number in sorted(tokenizer.get_vocab().values()) if number not in special]
    texts = [tokenizer.decode([number]) for number in words[:PROBED_TOKENS]]
    return any(set(tokenizer(text, add_special_tokens=False).input_ids) - special for text in texts)
