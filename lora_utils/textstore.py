"""Captions into the cache: both text encoders are loaded, used and freed."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from lora_utils.cache import Cache, CacheError
from lora_utils.encoders import TextEmbeddings, cut_text, encode_captions, encode_negative, too_long
from lora_utils.memory import best_device, free_memory
from lora_utils.progress import progress_bar
from lora_utils.sdxl import BaseModel

BATCH = 8


def encode_texts(
    cache: Cache,
    base: BaseModel,
    captions: Mapping[str, str],
    unconditional_key: str,
    max_token_length: int,
    dtype: torch.dtype,
) -> None:
    """Encode captions, and what stands for no caption.

    Args:
        cache: Where to.
        base: Where the encoders come from.
        captions: Key to caption.
        unconditional_key: Key of the record of no caption.
        max_token_length: 77, 150 or 225.
        dtype: Of the encoders and of what is kept.

    Raises:
        CacheError: An encoder's output is not finite.
    """
    pipeline = base.load_text_pipeline(dtype, best_device())
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    if unconditional_key not in cache:
        _add(cache, unconditional_key, encode_negative(pipeline, None, max_token_length), 0, [], "no caption")
    bar = progress_bar(captions.items(), "captions")
    for batch in _batches(list(captions), BATCH):
        texts = [captions[key] for key in batch]
        # Always a full batch: the last bits of a row can depend on the batch's size, but not on its other rows.
        embeddings = encode_captions(pipeline, texts + texts[-1:] * (BATCH - len(texts)), max_token_length)
        for place, (key, caption) in enumerate(zip(batch, texts, strict=True)):
            notes = _notes(tokenizers, caption, max_token_length)
            _add(cache, key, embeddings, place, notes, f"caption '{caption[:60]}'")
        bar.update(len(batch))
    bar.close()
    cache.commit()
    del pipeline
    free_memory()


def _add(cache: Cache, key: str, texts: TextEmbeddings, place: int, notes: list[list[str]], source: str) -> None:
    record = {"prompt_embeds": texts.prompt_embeds[place], "pooled_prompt_embeds": texts.pooled_prompt_embeds[place]}
    try:
        cache.add("texts", key, record, notes)
    except CacheError as error:
        raise CacheError(f"{source}: {error}; set mixed_precision=fp32 for the text encoders") from error


def _notes(tokenizers: Sequence[object], caption: str, max_token_length: int) -> list[list[str]]:
    count, rest = cut_text(tokenizers, caption, max_token_length)
    return [[*too_long(count, rest), "noticed"]] if rest else []


def _batches(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
