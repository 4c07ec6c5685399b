"""Looks at examples without decoding them: what their bytes are, which shape and which crops they get.

A hash of an image's bytes, not its name, is what the cache, the held-out images and the random crops go by: a
data set that was moved, renamed or captioned anew is not encoded anew.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from lora_utils.config.data import DataConfig
from lora_utils.data.captions import caption_variants
from lora_utils.data.crops import Crop, choose_size, cropped_share, enlargement, plan_crops
from lora_utils.data.examples import DataError, Example
from lora_utils.data.findings import Finding, noticed, table
from lora_utils.data.images import ImageError, read_header
from lora_utils.system.progress import progress_bar

TOO_MUCH_CROPPED = 0.5
"""Share of an image beyond which a user is told."""
MANY = 2000
"""Files whose reading takes long enough to show a bar."""
DRAWN = b"iTXtlora_utils\0"
"""Begins the chunk of a PNG in which ``compare.png`` keeps the settings that it was drawn with."""
DRAWN_WITHIN_BYTES = 4096
"""Pillow writes such chunks before the pixels, and few others come first."""
ALPHA = "alpha"
"""Stands for the hash of a mask that lies in the image itself."""


@dataclass(frozen=True)
class InspectedExample:
    """An example whose file looks like an image; its pixels have not been decoded."""

    example: Example
    content_hash: str
    """SHA-256 of the image file."""
    mask_hash: str | None
    """SHA-256 of the mask file; ALPHA for the alpha channel; None without a mask."""
    has_alpha: bool
    crops: tuple[Crop, ...]
    captions: tuple[str, ...]
    """All variants, as they will be encoded; the first is the caption as it was written."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that it is trained in, pixels."""
        return self.crops[0].size

    @property
    def area_px(self) -> int:
        """Pixels of the whole image, before any resize: what decoding it costs."""
        width, height = self.crops[0].original
        return width * height


def inspect_examples(
    examples: Sequence[Example], config: DataConfig
) -> tuple[list[InspectedExample], list[Finding]]:
    """Hash every file and read its header; what cannot be used is a finding and left out."""
    usable = []
    findings = []
    first: dict[str, str] = {}  # sources by content hash
    for example in progress_bar(examples, "files", shown=len(examples) > MANY):
        try:
            inspected = _inspect(example, config)
        except ImageError as error:
            findings.append(error.finding(example.source))
            continue

        # Both stay: captions may differ on purpose, and only the user knows which one to drop.
        twin = first.setdefault(inspected.content_hash, example.source)
        if twin != example.source:
            problem = noticed(f"same picture as another (as {twin})", "both are used")
            findings.append(problem.of(example.source))
        findings += [finding.of(example.source) for finding in _peculiarities(inspected, config)]
        usable.append(inspected)
    return usable, findings


def read_unchanged(inspected: InspectedExample) -> tuple[bytes, bytes | None]:
    """The encoded image file and its mask file, if there is one.

    Raises:
        ImageError: One has vanished, or is not what was inspected: its record would carry the wrong name.
    """
    example = inspected.example
    content = example.read()
    mask = example.read_mask() if example.read_mask else None
    # Without a mask file the recorded hash is None or ALPHA, and neither can have changed on its own.
    mask_hash = inspected.mask_hash if mask is None else _hash(mask)
    if (_hash(content), mask_hash) != (inspected.content_hash, inspected.mask_hash):
        raise ImageError("changed while it was read", "run the same command again")
    return content, mask


def held_out_hashes(examples: Sequence[InspectedExample], validation_split: float) -> set[str]:
    """Content hashes of the images that are held out.

    Chosen by their bytes alone: new captions, seeds and names leave the choice.

    Args:
        examples: All of them.
        validation_split: Share of the different images, in [0, 1); at least one is held out unless it is 0.
    """
    if not validation_split:
        return set()
    # Hashes are uniform, so the smallest ones are a fair draw; and copies of an image are held out together.
    different = sorted({example.content_hash for example in examples})
    return set(different[: max(1, round(len(different) * validation_split))])


def require_training(
    examples: Sequence[InspectedExample], findings: Sequence[Finding], validation_split: float
) -> None:
    """Nothing, where there is something to train on.

    Raises:
        DataError: Nothing is left, or everything is held out.
    """
    # Here the table is at hand; an empty cache would fail later, and could not say why it is empty.
    if not examples:
        raise DataError(f"nothing is left to train on; do what the last column says\n{table(findings)}")
    held_out = held_out_hashes(examples, validation_split)
    if all(example.content_hash in held_out for example in examples):
        raise DataError("validation_split leaves no image to train on; lower it, or add images")


def _inspect(example: Example, config: DataConfig) -> InspectedExample:
    content = example.read()
    if DRAWN in content[:DRAWN_WITHIN_BYTES]:
        # The base model's are among them: nobody wants those for examples of a new style.
        action = "remove it; to learn it all the same, save it anew without its settings"
        raise ImageError("picture that compare has drawn", action)
    header = read_header(content)
    original = header.width, header.height
    content_hash = _hash(content)
    # The header suffices for shape and crops; pixels are left to the workers, and to when they are needed.
    crops = plan_crops(original, choose_size(original, config), content_hash, config)

    mask_hash = ALPHA if config.alpha_mask and header.has_alpha else None
    if example.read_mask is not None:  # a file of its own comes before the alpha channel
        mask_hash = _hash(example.read_mask())

    captions: dict[str, None] = {}  # in their order, each once: different captions may have equal variants
    for caption in example.captions:
        captions |= dict.fromkeys(caption_variants(caption, config))
    return InspectedExample(example, content_hash, mask_hash, header.has_alpha, tuple(crops), tuple(captions))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _peculiarities(inspected: InspectedExample, config: DataConfig) -> list[Finding]:
    """What a user may not have meant, although the image can be used."""
    original = inspected.crops[0].original
    findings = []
    factor = enlargement(original, inspected.size)
    if factor > 1:
        # SDXL learns such blur unless time_ids tell it, and even then a larger picture teaches more.
        problem = f"smaller than its frame ({original[0]}x{original[1]})"
        findings.append(noticed(problem, f"enlarged {factor:.2g} times"))

    share = cropped_share(original, inspected.size)
    if share > TOO_MUCH_CROPPED:
        cure = "enable_bucket would keep more of it"
        if config.enable_bucket:
            cure = "its shape is beyond the buckets"
        findings.append(noticed(f"much is cropped away ({share:.0%})", cure))

    if config.alpha_mask and inspected.mask_hash is None:
        findings.append(noticed("no alpha channel", "all of it is learned"))
    return findings
