"""Texts of any length against diffusers' encode_prompt and against chunks put together by hand."""

import pytest
import torch

from lora_utils.model.text import cut_text, encode_captions, encode_negative

LONG = " ".join(f"a red star number {number}" for number in range(60))


def test_up_to_77_tokens_it_is_the_pipelines_own(tiny_pipeline):
    captions = ["a red star on a blue background", "", LONG]
    ours = encode_captions(tiny_pipeline, captions)
    embeds, _, pooled, _ = tiny_pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.prompt_embeds, embeds)
    torch.testing.assert_close(ours.pooled_prompt_embeds, pooled)


@pytest.mark.parametrize("negative", [None, "", "blurry"])
def test_the_other_side_of_guidance_is_the_pipelines_own(tiny_pipeline, negative):
    ours = encode_negative(tiny_pipeline, negative)
    _, embeds, _, pooled = tiny_pipeline.encode_prompt("x", negative_prompt=negative)
    torch.testing.assert_close(ours.prompt_embeds, embeds)
    torch.testing.assert_close(ours.pooled_prompt_embeds, pooled)


@pytest.mark.parametrize(("limit", "chunks"), [(150, 2), (225, 3)])
@pytest.mark.parametrize("caption", ["short", LONG, " ".join(["star"] * 75), " ".join(["star"] * 76)])
def test_longer_texts_are_chunks_between_the_first_bos_and_the_last_eos(
    tiny_pipeline, caption, limit, chunks
):
    ours = encode_captions(tiny_pipeline, [caption], limit)
    parts = []
    pooled = None
    for tokenizer, encoder in (
        (tiny_pipeline.tokenizer, tiny_pipeline.text_encoder),
        (tiny_pipeline.tokenizer_2, tiny_pipeline.text_encoder_2),
    ):
        ids = tokenizer(caption, truncation=False).input_ids[1:-1]
        states = []
        for chunk in range(chunks):
            words = ids[75 * chunk : 75 * chunk + 75]
            row = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * (77 - len(row))
            with torch.no_grad():
                output = encoder(torch.tensor([row]), output_hidden_states=True)
            pooled = output[0] if chunk == 0 else pooled
            states.append(output.hidden_states[-2][0])
        inner = [state[1:76] for state in states]
        parts.append(torch.cat([states[0][:1], *inner, states[-1][76:]]))
        last = pooled
    assert ours.prompt_embeds.shape[1] == 75 * chunks + 2
    torch.testing.assert_close(ours.prompt_embeds[0], torch.cat(parts, dim=-1))
    torch.testing.assert_close(ours.pooled_prompt_embeds, last)


def test_what_is_cut_off_is_the_end_of_the_text(tiny_pipeline):
    tokenizers = [tiny_pipeline.tokenizer, tiny_pipeline.tokenizer_2]
    caption = " ".join(["star"] * 75 + ["Ring,", "cross"])
    count, rest = cut_text(tokenizers, caption, 77)
    assert count == 78
    assert rest == "Ring, cross"
    assert cut_text(tokenizers, "a star", 77)[1] == ""
    assert cut_text(tokenizers, caption, 225)[1] == ""
