"""The settings of data: where it comes from, how it is captioned, framed and kept."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    model_validator,
)

from lora_utils.config.section import (
    Fraction,
    Location,
    NameOrPath,
    NonNegativeInt,
    Numbers,
    Paths,
    PositiveInt,
    Section,
)

MOST_VARIANTS = 1000  # of one image or caption; each is encoded and kept
MOST_WORKERS = 256


def parse_size(value: Any) -> Any:
    """``1024``, ``"1280x720"``, ``"1280 720"`` or ``[1280, 720]`` as (width, height) in pixels."""
    if isinstance(value, list | tuple):
        value = " ".join(str(side) for side in value)
    # Flags, YAML and notebooks write it in different ways, and all of them arrive here.
    sides = re.split(r"[x×,\s]+", str(value).strip().lower())
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ValueError("should be a number such as 1024, or width and height such as 1280x720")
    return int(sides[0]), int(sides[-1])


def _colour(value: str) -> str:
    # Imported late: --help needs no Pillow.
    from PIL import ImageColor

    try:
        ImageColor.getrgb(value)
    except ValueError:
        raise ValueError("should be the name of a colour, or #rrggbb") from None
    return value


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value  # a Literal takes no "150"


def _with_dot(value: Any) -> Any:
    return f".{value}" if isinstance(value, str) and not value.startswith(".") else value


def _size_text(size: tuple[int, int]) -> int | str:
    return size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"


SidePx = Annotated[int, Field(ge=32, le=4096, multiple_of=8)]
Resolution = Annotated[tuple[SidePx, SidePx], BeforeValidator(parse_size), PlainSerializer(_size_text)]
CaptionLines = Literal["each", "one"]


class DataConfig(Section):
    """What is learned from, and how it is framed and captioned; docs/data.md shows examples."""

    train_data_dir: Paths | None = None
    """Folders of images with captions; also the data_dir that your own dataset_name file gets."""
    num_repeats: Numbers = [1]
    """How often an epoch shows each image of a folder: one number, or one per train_data_dir."""
    dataset_name: NameOrPath | None = None
    """Hub id or local folder of a dataset, or your own Python file that yields images and captions."""
    dataset_config_name: str | None = None
    """Configuration of a Hub dataset that has several."""
    dataset_split: str = "train"
    """Split of the dataset."""
    image_column: str | None = None
    """Column of images; found by name when not given."""
    caption_column: str | None = None
    """Column of captions; found by name when not given."""
    caption_extension: Annotated[str, BeforeValidator(_with_dot), Field(pattern=r"^\.[\w.]+$")] | None = None
    """Ending of the caption files; .txt, else .caption, .cap or .tags when not given."""
    caption_lines: CaptionLines = "each"
    """Lines of a caption file: each is a caption, of which a visit picks one; or all of them are one."""
    instance_prompt: str | None = None
    """Caption of the images that have none of their own."""
    trigger_word: str | None = None
    """Put before every caption that lacks it; [trigger] in a caption is replaced by it."""
    shuffle_caption: bool = False
    """Shuffle comma-separated tags: caption_variants orders of each are encoded, a visit picks one."""
    keep_tokens: NonNegativeInt = 0
    """How many leading tags stay in place when tags are shuffled."""
    caption_variants: Annotated[int, Field(ge=1, le=MOST_VARIANTS)] = 4
    """Orders of a shuffled caption that are encoded."""
    caption_dropout_rate: Fraction = 0.1
    """Share of visits without caption, so that the unconditional side of guidance learns too."""
    max_token_length: Annotated[Literal[77, 150, 225], BeforeValidator(_number)] = 77
    """Tokens that a caption may have; beyond 77 it is encoded in chunks of 75, as sd-scripts does."""
    resolution: Resolution = (1024, 1024)
    """Size of training and comparison images in pixels: 1024, or 1280x720 for width x height."""
    random_crop: bool = False
    """Crop anywhere instead of in the middle: crop_variants crops are encoded, a visit picks one."""
    crop_variants: Annotated[int, Field(ge=1, le=MOST_VARIANTS)] = 4
    """Crops of each image that are encoded with random_crop."""
    random_flip: bool = False
    """Encode the mirrored image too; a visit picks one of both."""
    enable_bucket: bool = False
    """Give each image the shape nearest to its own among those of resolution's area, not one for all."""
    min_bucket_reso: SidePx = 256
    """Shortest side of a bucket in pixels."""
    max_bucket_reso: SidePx = 2048
    """Longest side of a bucket in pixels."""
    bucket_reso_steps: Annotated[int, Field(ge=8, le=512, multiple_of=8)] = 64
    """Sides of buckets are multiples of this."""
    bucket_no_upscale: bool = False
    """Never enlarge an image: smaller ones get smaller buckets of their own."""
    alpha_background: Annotated[str, AfterValidator(_colour)] = "white"
    """Colour that shows through transparent pixels: a name or #rrggbb."""
    mask_data_dir: Location | None = None
    """Folder of grey masks named like the images: the loss counts where a mask is white."""
    alpha_mask: bool = False
    """Use the images' alpha channel as such a mask."""
    vae_batch_size: PositiveInt | None = None
    """Images that the VAE encodes together; what fits when not given."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=MOST_WORKERS)] | None = None
    """Processes that decode images while the VAE works; as many as help when not given."""
    latent_mode: Literal["sample", "mean"] = "sample"
    """Draw latents afresh from the VAE's posterior on every visit, or use its mean."""
    validation_split: Fraction = 0.0
    """Share of the images that is held out of training to measure the held-out loss."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        shortest = self.min_bucket_reso
        longest = self.max_bucket_reso
        if self.enable_bucket and not shortest <= min(self.resolution) <= max(self.resolution) <= longest:
            raise ValueError(
                f"resolution {self.resolution[0]}x{self.resolution[1]} must lie between min_bucket_reso "
                f"{shortest} and max_bucket_reso {longest}; change one of them"
            )
        if self.bucket_no_upscale and not self.enable_bucket:
            raise ValueError("bucket_no_upscale needs enable_bucket; set both or neither")
        folders = len(self.train_data_dir or [])
        if len(self.num_repeats) not in (1, folders):
            raise ValueError("num_repeats takes one number, or one for each train_data_dir")
        if self.mask_data_dir and self.alpha_mask:
            raise ValueError("mask_data_dir and alpha_mask exclude each other")
        return self
