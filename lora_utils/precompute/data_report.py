"""Looks at all of the data before anything heavy is loaded: what is used, what not, and how training will
go.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from PIL import Image

from lora_utils.config.data import DataConfig
from lora_utils.config.section import Size
from lora_utils.config.training import TrainConfig
from lora_utils.data.crops import Crop
from lora_utils.data.dataset import find_examples
from lora_utils.data.decoding import Job, decode_all, new_job
from lora_utils.data.duplicates import near_duplicates, perceptual_hash
from lora_utils.data.findings import Finding, noticed, table
from lora_utils.data.images import ImageError
from lora_utils.data.inspection import (
    InspectedExample,
    held_out_hashes,
    inspect_examples,
    require_training,
)
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.text import cut_text, too_long
from lora_utils.system.progress import progress_bar

THUMBNAIL_PX = (64, 64)
BAR_WIDTH = 30
SAMPLES = 3


@dataclass(frozen=True)
class DataReport:
    """What the data is; as text by ``str``."""

    rule: str
    """Where examples and captions come from."""
    examples: list[InspectedExample]
    """What will be used."""
    findings: list[Finding]
    """What is wrong, and what was done."""
    token_counts: list[int] | None
    """Of each caption variant; None while the tokenizers would have to be downloaded."""
    data: DataConfig
    train: TrainConfig
    doubts: Sequence[str] = ()
    """Settings that will run, and most likely are not meant."""

    @property
    def visits_per_epoch(self) -> int:
        """Of examples that are not held out, with their repeats."""
        held_out = held_out_hashes(self.examples, self.data.validation_split)
        return sum(
            example.example.repeats for example in self.examples if example.content_hash not in held_out
        )

    @property
    def shapes(self) -> Counter[Size]:
        """Width and height in pixels to how many examples are trained in them."""
        return Counter(example.size for example in self.examples)

    def __str__(self) -> str:
        refused = sum(finding.kind == "refused" for finding in self.findings)
        # By the same rule as in precompute, so that the counts here are those of the run.
        held_out = held_out_hashes(self.examples, self.data.validation_split)
        crops = sum(len(example.crops) for example in self.examples)
        captions = sum(len(example.captions) for example in self.examples)
        masks = sum(example.mask_hash is not None for example in self.examples)
        lines = [
            f"data        {self.rule}",
            f"examples    {len(self.examples)} usable, {len(held_out)} images held out, {refused} refused",
            f"to encode   {crops} images and {captions} captions, where the cache lacks them",
            *_histogram(self.shapes),
            *([f"masks       of {masks} examples"] if masks else []),
            f"captions    {self._lengths()}",
            *self._samples(),
            f"training    {self._steps(self.visits_per_epoch)}",
            *(f"doubt       {sentence}" for sentence in self.doubts),
        ]
        return "\n".join(lines) + "\n\n" + table(self.findings)

    def _samples(self) -> Iterator[str]:
        """A few captions, from all over the data: a wrong column or folder is seen at once."""
        spread = self.examples[:: max(1, len(self.examples) // SAMPLES)]
        for number, example in enumerate(spread[:SAMPLES]):
            label = "" if number else "such as"
            yield f"{label:12}{example.example.source}: {example.captions[0]}"

    def _lengths(self) -> str:
        counts = self.token_counts
        limit = self.data.max_token_length
        if counts is None:
            return "counted by precompute: the base model's tokenizers are not here yet"
        if not counts:
            return "none"
        longer = sum(count > limit // 75 * 75 for count in counts)
        return (
            f"{min(counts)} to {max(counts)} tokens, median {median(counts):g}; {longer} too long for {limit}"
        )

    def _steps(self, visits: int) -> str:
        steps = self.train.total_steps(visits)
        per_step = self.train.train_batch_size * self.train.gradient_accumulation_steps
        return f"{steps} steps of {per_step} visits, {steps * per_step / visits:.1f} epochs of {visits}"


def report_on_data(data: DataConfig, train: TrainConfig, base: PretrainedSdxl) -> DataReport:
    """Read every caption and decode every image; no weights are loaded and nothing is written.

    Args:
        data: Where the data comes from, and how it is framed.
        train: How many visits a step takes.
        base: For its tokenizers, where they are on this machine.

    Raises:
        DataError: There is nothing to train on.
    """
    found_examples = find_examples(data)
    inspected, findings = inspect_examples(found_examples.examples, data)
    usable, decoding_findings = _decode(inspected, data)
    # Equal captions are counted once, as they are encoded once.
    captions = list(dict.fromkeys(caption for example in usable for caption in example.captions))
    tokenizers = base.find_tokenizers()
    counts = None
    cuts: dict[str, tuple[int, str]] = {}
    if tokenizers:
        counts, cuts = _count_tokens(tokenizers, captions, data.max_token_length)

    findings = [*found_examples.findings, *findings, *decoding_findings, *_long_captions(usable, cuts)]
    findings += _rare_shapes(usable, train.train_batch_size)
    require_training(usable, findings, data.validation_split)
    return DataReport(found_examples.rule, usable, findings, counts, data, train)


def _decode(
    examples: Sequence[InspectedExample], config: DataConfig
) -> tuple[list[InspectedExample], list[Finding]]:
    """The examples that decode, and what was wrong with the others, fixed, or there twice."""
    usable = []
    findings: list[Finding] = []
    hashes = []
    vanished: list[Finding] = []
    results = decode_all(
        _jobs(examples, config, vanished),
        [example.area_px for example in examples],
        config.dataloader_num_workers,
    )
    for decoded in progress_bar(results, "images", len(examples)):
        if decoded.refusal is not None:
            findings.append(decoded.refusal)
            continue
        [picture] = decoded.pictures
        findings += picture.findings
        usable.append(examples[decoded.number])
        # Of thumbnails: a hash of 64 bits needs no more, and memory stays small.
        hashes.append(perceptual_hash(Image.fromarray(picture.pixels)))
    return usable, findings + _twins(usable, hashes) + vanished


def _jobs(examples: Sequence[InspectedExample], config: DataConfig, vanished: list[Finding]) -> Iterator[Job]:
    """Each image as a whole, small: enough to see whether it decodes, and to compare it with the others."""
    for number, example in enumerate(examples):
        whole = Crop(example.crops[0].original, THUMBNAIL_PX, 0, 0, THUMBNAIL_PX)
        try:
            yield new_job(number, example, {"thumbnail": whole}, config)
        except ImageError as error:
            vanished.append(error.finding(example.example.source))


def _twins(examples: Sequence[InspectedExample], hashes: Sequence[tuple[int, bytes]]) -> list[Finding]:
    """Pictures that are nearly the same; those that are exactly the same were told when they were
    inspected.
    """
    twins: dict[int, int] = {}
    for first, second in near_duplicates(hashes):
        if examples[first].content_hash != examples[second].content_hash:
            twins.setdefault(second, first)
    findings = []
    for second, first in twins.items():
        problem = f"nearly the same picture as another (as {examples[first].example.source})"
        findings.append(noticed(problem, "both are used").of(examples[second].example.source))
    return findings


def _count_tokens(
    tokenizers: Sequence[Any], captions: Sequence[str], limit: int
) -> tuple[list[int], dict[str, tuple[int, str]]]:
    """Tokens of each caption; and of those that are too long, their tokens and what is cut off."""
    cuts = {caption: cut_text(tokenizers, caption, limit) for caption in captions}
    counts = [count for count, _ in cuts.values()]
    return counts, {caption: cut for caption, cut in cuts.items() if cut[1]}


def _long_captions(examples: Sequence[InspectedExample], cuts: dict[str, tuple[int, str]]) -> list[Finding]:
    findings = []
    for example in examples:
        caption = next((caption for caption in example.captions if caption in cuts), None)
        if caption is not None:
            findings.append(noticed(*too_long(*cuts[caption])).of(example.example.source))
    return findings


def _rare_shapes(examples: Sequence[InspectedExample], batch: int) -> list[Finding]:
    """Shapes with fewer visits in an epoch than a batch has: they wait for the next epoch."""
    visits: Counter[Size] = Counter()
    for example in examples:
        visits[example.size] += example.example.repeats
    # With one shape, an epoch that is smaller than a batch runs on into the next.
    if len(visits) == 1:
        return []
    findings = []
    for (width, height), count in sorted(visits.items()):
        if count < batch:
            problem = noticed(
                f"fewer than a batch ({count} of {batch})", "waits for its own kind, over several epochs"
            )
            findings.append(problem.of(f"{width}x{height}"))
    return findings


def _histogram(shapes: Counter[Size]) -> Iterator[str]:
    most = max(shapes.values(), default=1)
    for number, ((width, height), count) in enumerate(sorted(shapes.items())):
        label = "" if number else "shapes"
        bar = "█" * max(1, BAR_WIDTH * count // most)
        yield f"{label:12}{f'{width}x{height}':10}{bar} {count}"
