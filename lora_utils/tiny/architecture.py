"""The tiny SDXL's shape: all classes and all conditioning of the real one, a thousandth of its size.

64 px images are 16 x 16 x 4 latents. The U-Net's topology is SDXL's: no attention at the finest level, most
transformer layers at the coarsest, and modules of the same names; but one residual block a level, not two,
since a step of so small a model takes as long as it has operators.
"""

import json
from pathlib import Path

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_WIDTH = 64
"""Of each encoder's hidden states, and of the pooled embedding; 768 and 1280 in SDXL."""
TOKEN_LIMIT = 77
"""CLIP's."""
VOCABULARY_LIMIT = 1000
START = "<|startoftext|>"
END = "<|endoftext|>"


def build_vae() -> AutoencoderKL:
    """Three levels, 4 x smaller latents of 4 channels; random weights."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,  # SDXL's own VAE overflows fp16; this one does not
    )


def build_unet() -> UNet2DConditionModel:
    """SDXL's blocks and conditioning, in widths that nf4's blocks of 64 divide; random weights."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(3, 4, 4),  # the number of heads, under diffusers' historical name: all 16 wide
        cross_attention_dim=2 * TEXT_WIDTH,  # both encoders' hidden states, one beside the other
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 16,  # pooled embedding, six time ids of 16
    )


def build_text_encoders(vocabulary: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two encoders of two layers; SDXL reads the last but one. Random weights.

    Args:
        vocabulary: Number of tokens, START and END last.
    """

    # A config of its own for each: saving writes the model's class into it.
    def shape() -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKEN_LIMIT,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )

    return CLIPTextModel(shape()), CLIPTextModelWithProjection(shape())


def build_scheduler() -> EulerDiscreteScheduler:
    """The settings of stabilityai/stable-diffusion-xl-base-1.0."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_tokenizers(corpus: list[str], folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Byte-level BPE learned from ``corpus``; unknown words fall back to letters, so any text can be encoded.

    As in SDXL the first tokenizer pads with the end token and the second with ``!``.

    Args:
        corpus: Captions.
        folder: Made where it is absent; holds vocab.json and merges.txt afterwards.
    """
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]

    # Numbered as in CLIP: letters, letters that end a word, merges, the two special tokens; "!" is 0. Of the
    # trainer only the merges: it knows a letter that ends a word only where one of the corpus does.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair) for pair in learned["merges"]]
    words = ["!", *(letter for letter in letters if letter != "!"), *(letter + "</w>" for letter in letters)]
    words += [left + right for left, right in merges]
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(words), START, END])}

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8"
    )
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    first = CLIPTokenizer(*files, model_max_length=TOKEN_LIMIT, pad_token=END)
    second = CLIPTokenizer(*files, model_max_length=TOKEN_LIMIT, pad_token="!")
    return first, second
