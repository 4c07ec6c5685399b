"""Looks at all of the data before anything heavy is loaded: what is used, what not, and how training will go."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from PIL import Image

from lora_utils.config.data import DataConfig
from lora_utils.config.schema import RunConfig
from lora_utils.data.crops import Crop
from lora_utils.data.dataset import find_examples
from lora_utils.data.decoding import Job, decode_all
from lora_utils.data.duplicates import near_duplicates, perceptual_hash
from lora_utils.data.findings import Finding, refusal, table
from lora_utils.data.images import ImageError
from lora_utils.data.inspection import (
    ALPHA,
    InspectedExample,
    held_out_hashes,
    inspect_examples,
    read_unchanged,
    require_training,
)
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.text import cut_text, too_long
from lora_utils.system.progress import progress_bar

THUMBNAIL = (64, 64)
BAR_WIDTH = 30
SAMPLES = 3


@dataclass(frozen=True)
class DataReport:
    """What the data is; as text by ``str``."""

    rule: str
    """Where examples and captions come from."""
    examined: list[InspectedExample]
    """What will be used."""
    findings: list[Finding]
    """What is wrong, and what was done."""
    token_counts: list[int] | None
    """Of each caption variant; None while the tokenizers would have to be downloaded."""
    config: RunConfig

    @property
    def shapes(self) -> Counter[tuple[int, int]]:
        """Width and height in pixels to how many examples are trained in them."""
        return Counter(one.size for one in self.examined)

    def __str__(self) -> str:
        refused = sum(finding.kind == "refused" for finding in self.findings)
        held_out = held_out_hashes(self.examined, self.config.data.validation_split)
        training = [one for one in self.examined if one.content_hash not in held_out]
        variants = (
            sum(len(one.crops) for one in self.examined),
            sum(len(one.captions) for one in self.examined),
        )
        masks = sum(one.mask_hash is not None for one in self.examined)
        samples = list(enumerate(self.examined[:: max(1, len(self.examined) // SAMPLES)][:SAMPLES]))
        lines = [
            f"data        {self.rule}",
            f"examples    {len(self.examined)} usable, {len(held_out)} images held out, {refused} refused",
            f"to encode   {variants[0]} images and {variants[1]} captions, where the cache lacks them",
            *_histogram(self.shapes),
            *([f"masks       of {masks} examples"] if masks else []),
            f"captions    {self._lengths()}",
            *(
                f"{'such as' if not place else '':12}{one.example.source}: {one.captions[0]}"
                for place, one in samples
            ),
            f"training    {self._steps(sum(one.example.repeats for one in training))}",
        ]
        return "\n".join(lines) + "\n\n" + table(self.findings)

    def _lengths(self) -> str:
        counts, limit = self.token_counts, self.config.data.max_token_length
        if counts is None:
            return "counted by precompute: the base model's tokenizers are not here yet"
        if not counts:
            return "none"
        longer = sum(count > limit // 75 * 75 for count in counts)
        return (
            f"{min(counts)} to {max(counts)} tokens, median {median(counts):g}; {longer} too long for {limit}"
        )

    def _steps(self, visits: int) -> str:
        train = self.config.train
        steps, per_step = (
            train.total_steps(visits),
            train.train_batch_size * train.gradient_accumulation_steps,
        )
        return f"{steps} steps of {per_step} visits, {steps * per_step / visits:.1f} epochs of {visits}"


def report_on_data(config: RunConfig, base: PretrainedSdxl) -> DataReport:
    """Read every caption and decode every image; no weights are loaded and nothing is written.

    Args:
        config: Of the run.
        base: For its tokenizers, where they are on this machine.

    Raises:
        DataError: There is nothing to train on.
    """
    found = find_examples(config.data)
    examined, findings = inspect_examples(found.examples, config.data)
    usable, decoding_findings = _decode(examined, config.data)
    tokenizers = base.find_tokenizers()
    captions = list(dict.fromkeys(caption for one in usable for caption in one.captions))
    counts, cuts = (
        _count_tokens(tokenizers, captions, config.data.max_token_length) if tokenizers else (None, {})
    )
    findings = [*found.findings, *findings, *decoding_findings, *_long_captions(usable, cuts)]
    findings += _rare_shapes(usable, config.train.train_batch_size)
    require_training(usable, findings, config.data.validation_split)
    return DataReport(found.rule, usable, findings, counts, config)


def _decode(
    examined: Sequence[InspectedExample], config: DataConfig
) -> tuple[list[InspectedExample], list[Finding]]:
    usable, findings, prints = [], [], []
    vanished: list[Finding] = []
    jobs = _jobs(examined, config, vanished)
    pictures = decode_all(jobs, [one.area_px for one in examined], config.dataloader_num_workers)
    for picture in progress_bar(pictures, "images", len(examined)):
        one = examined[picture.number]
        if picture.refusal is not None:
            findings.append(refusal(one.example.source, picture.refusal))
            continue
        findings += [
            Finding(one.example.source, problem, action, "fixed") for problem, action in picture.notices
        ]
        usable.append(one)
        prints.append(perceptual_hash(Image.fromarray(picture.pixels[0])))
    twins: dict[int, int] = {}
    for first, second in near_duplicates(prints):
        if usable[first].content_hash != usable[second].content_hash:
            twins.setdefault(second, first)
    for second, first in twins.items():
        problem = f"nearly the same picture as another (as {usable[first].example.source})"
        findings.append(Finding(usable[second].example.source, problem, "both are used", "noticed"))
    return usable, findings + vanished


def _jobs(examined: Sequence[InspectedExample], config: DataConfig, vanished: list[Finding]) -> Iterator[Job]:
    for number, one in enumerate(examined):
        try:
            content, mask = read_unchanged(one)
        except ImageError as error:
            vanished.append(refusal(one.example.source, error))
            continue
        whole = Crop(one.crops[0].original, THUMBNAIL, 0, 0, THUMBNAIL)
        yield Job(number, content, (whole,), config.alpha_background, mask, one.mask_hash == ALPHA)


def _count_tokens(
    tokenizers: Sequence[Any], captions: Sequence[str], limit: int
) -> tuple[list[int], dict[str, tuple[int, str]]]:
    cuts = {caption: cut_text(tokenizers, caption, limit) for caption in captions}
    return [count for count, _ in cuts.values()], {caption: cut for caption, cut in cuts.items() if cut[1]}


def _long_captions(examined: Sequence[InspectedExample], cuts: dict[str, tuple[int, str]]) -> list[Finding]:
    found = []
    for one in examined:
        if (caption := next((caption for caption in one.captions if caption in cuts), None)) is not None:
            count, rest = cuts[caption]
            found.append(Finding(one.example.source, *too_long(count, rest), "noticed"))
    return found


def _rare_shapes(examined: Sequence[InspectedExample], batch: int) -> list[Finding]:
    shapes = Counter(one.size for one in examined for _ in range(one.example.repeats))
    rare = {size: count for size, count in sorted(shapes.items()) if count < batch and len(shapes) > 1}
    action = "waits for its own kind, over several epochs"
    return [
        Finding(f"{width}x{height}", f"fewer than a batch ({count} of {batch})", action, "noticed")
        for (width, height), count in rare.items()
    ]


def _histogram(shapes: Counter[tuple[int, int]]) -> list[str]:
    most = max(shapes.values(), default=1)
    return [
        f"{'shapes' if not number else '':12}{f'{width}x{height}':10}{'█' * max(1, BAR_WIDTH * count // most)} {count}"
        for number, ((width, height), count) in enumerate(sorted(shapes.items()))
    ]
