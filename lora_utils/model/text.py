"""Captions to embeddings, by both of SDXL's text encoders; captions that are too long are cut and named.

Shapes: N captions, L tokens (77, 152 or 227), D width of both text encoders together (2048 in SDXL),
P pooled width (1280). A chunk is the 75 tokens that a text encoder sees between its BOS and EOS.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

CHUNK = 75
CAPTIONS_PER_BATCH = 8


@dataclass(frozen=True)
class TextEmbeddings:
    """What the U-Net is told about a text."""

    prompt_embeds: Tensor
    """Last but one hidden states of both encoders side by side, (N, L, D)."""
    pooled_prompt_embeds: Tensor
    """Projected pooled output of the second encoder, (N, P)."""

    def __getitem__(self, index: int) -> "TextEmbeddings":
        """One text, still with a leading 1."""
        return TextEmbeddings(
            self.prompt_embeds[index : index + 1], self.pooled_prompt_embeds[index : index + 1]
        )


@torch.no_grad()
def encode_captions(
    pipeline: "StableDiffusionXLPipeline", captions: Sequence[str], max_token_length: int = 77
) -> TextEmbeddings:
    """Embed texts with both encoders; results are on the CPU, in the encoders' dtype.

    Up to 77 tokens, BOS and EOS among them, this is the pipeline's own ``encode_prompt``. Longer texts are
    cut into chunks of 75 tokens, each is encoded between its own BOS and EOS, and their hidden states are
    joined between the first BOS and the last EOS, as sd-scripts does for max_token_length 150 and 225; the
    pooled output is the first chunk's.

    Args:
        pipeline: With tokenizers and text encoders.
        captions: N texts.
        max_token_length: 77, 150 or 225; L is then 77, 152 or 227. What goes beyond is cut off.
    """
    chunks = max_token_length // CHUNK
    states = []
    pooled = None
    for tokenizer, encoder in _encoders(pipeline):
        ids = [chunk for caption in captions for chunk in _token_chunks(tokenizer, caption, chunks)]
        output = encoder(torch.tensor(ids, device=encoder.device), output_hidden_states=True)

        # SDXL was trained on the last but one layer (Podell et al., 2023, section 2.1), without the final
        # norm.
        hidden = output.hidden_states[-2].unflatten(0, (len(captions), chunks))
        first_bos = hidden[:, 0, :1]
        tokens = hidden[:, :, 1:-1].flatten(1, 2)
        last_eos = hidden[:, -1, -1:]
        states.append(torch.cat([first_bos, tokens, last_eos], dim=1))

        # Of the second encoder, which comes last and whose output stays, this is the projected text_embeds.
        pooled = output[0].unflatten(0, (len(captions), chunks))[:, 0]
    assert pooled is not None
    return TextEmbeddings(torch.cat(states, dim=-1).cpu(), pooled.cpu())


def encode_negative(
    pipeline: "StableDiffusionXLPipeline", negative_prompt: str | None, max_token_length: int = 77
) -> TextEmbeddings:
    """The unconditional side of guidance, N = 1: zeros without a negative prompt if the base says so."""
    texts = encode_captions(pipeline, [negative_prompt or ""], max_token_length)
    # None and "" differ: an empty negative prompt that was asked for is encoded like any other.
    if negative_prompt is None and pipeline.config.force_zeros_for_empty_prompt:
        return TextEmbeddings(
            torch.zeros_like(texts.prompt_embeds), torch.zeros_like(texts.pooled_prompt_embeds)
        )
    return texts


def cut_text(tokenizers: Sequence[Any], caption: str, max_token_length: int) -> tuple[int, str]:
    """How many tokens a caption has, BOS and EOS not counted, and the words that are not encoded whole.

    Args:
        tokenizers: Both; the one that needs more tokens counts.
        caption: One text.
        max_token_length: 77, 150 or 225.
    """

    def count(text: str) -> int:
        return max(len(_token_ids(tokenizer, text)) for tokenizer in tokenizers)

    limit = max_token_length // CHUNK * CHUNK
    total = count(caption)
    if total <= limit:
        return total, ""

    # By bisection, not word by word: a caption can be a whole page, and every count runs the tokenizer anew.
    words = caption.split()
    kept = bisect_right(range(len(words)), limit, key=lambda index: count(" ".join(words[: index + 1])))
    return total, " ".join(words[kept:])


def too_long(count: int, rest: str) -> tuple[str, str]:
    """Problem and action, for a caption whose rest is cut off.

    Args:
        count: Of its tokens, from ``cut_text``.
        rest: What is cut off, likewise.
    """
    longest = 3 * CHUNK
    cure = (
        "shorten it" if count > longest else f"max_token_length {150 if count <= 150 else 225} would keep it"
    )
    return f"caption too long ({count} tokens)", f"{cure}; cut off: {rest}"


def _encoders(pipeline: "StableDiffusionXLPipeline") -> list[tuple[Any, Any]]:
    return [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]


def _token_chunks(tokenizer: Any, caption: str, chunks: int) -> list[list[int]]:
    """Always so many chunks, of 77 ids each, so that captions of any length stack into one batch."""
    ids = _token_ids(tokenizer, caption)[: chunks * CHUNK]
    framed = []
    for start in range(0, chunks * CHUNK, CHUNK):
        chunk = [tokenizer.bos_token_id, *ids[start : start + CHUNK], tokenizer.eos_token_id]
        # The second tokenizer pads with 0, not with EOS: its own token decides.
        framed.append(chunk + [tokenizer.pad_token_id] * (CHUNK + 2 - len(chunk)))
    return framed


def _token_ids(tokenizer: Any, caption: str) -> list[int]:
    # verbose=False: transformers would warn of every caption beyond 77 tokens, which are cut here and named.
    return tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
