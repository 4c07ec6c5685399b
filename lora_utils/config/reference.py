"""Settings as --help and docs/settings.md show them: what values each takes, and which stage uses it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo

from lora_utils.config.schema import all_settings

# Each stage: the sections that it uses whole, what it uses of others, and what of its own it does not use.
SECTIONS = {
    "check": ("paths", "model", "data", "lora"),
    "precompute": ("paths", "model", "data"),
    "train": ("paths", "model", "data", "lora", "train", "checkpoint"),
    "compare": ("paths", "model", "compare"),
}
BESIDES = {
    "check": (
        *("max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps"),
        *("optimizer", "use_8bit_adam", "use_ema", "gradient_checkpointing", "vram_gib", "lean_step"),
        *("torch_compile", "checkpoints_total_limit", "mirror_dir"),
        *("prompt", "seeds", "num_inference_steps", "guidance_scale"),
    ),
    "precompute": ("resume_from_checkpoint", "mirror_dir"),
    "compare": ("resolution", "max_token_length", "rescale_betas_zero_snr"),
}
WITHOUT = {
    "check": ("latent_mode",),
    "precompute": ("infer_path",),
    "train": ("infer_path",),
    "compare": ("precompute_dir", "vae_precision"),
}
MOST_INTEGER = 2**31 - 1
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}


def settings_of(stage: str) -> list[str]:
    """Leaf names of the settings that a stage uses, in the schema's order."""
    used = []
    for leaf, (section, _) in all_settings().items():
        is_besides = leaf in BESIDES.get(stage, ())
        if is_besides or (section in SECTIONS[stage] and leaf not in WITHOUT.get(stage, ())):
            used.append(leaf)
    return used


def values_of(field: FieldInfo) -> str:
    """What a setting takes, in a few words: its choices, or its type and range."""
    if choices := choices_of(field):
        return ", ".join(choices)
    types = list(parts_of(field.annotation))
    words = next(KINDS[part] for part in types if part in KINDS)
    many = "one or more: " if {get_origin(part) for part in types} & {list, tuple} else ""
    return ", ".join([many + words, *range_of(field)])


def choices_of(field: FieldInfo) -> list[str]:
    """The words or numbers that a setting chooses among; empty where it takes others as well."""
    choices = []
    for part in parts_of(field.annotation):
        if get_origin(part) is Literal:
            choices += [str(choice) for choice in get_args(part)]
    return choices


def range_of(field: FieldInfo) -> list[str]:
    """The bounds of a number, in words."""
    words: dict[str, None] = {}  # in order, each once: width and height have the same
    for part in [*field.metadata, *parts_of(field.annotation)]:
        for bound in _bounds(part):
            words[bound] = None
    return list(words)


def parts_of(annotation: Any) -> Iterator[Any]:
    """What a type is made of: PositiveInt | None has int in it, and that it is above 0."""
    yield annotation
    # The inside of a Literal is no type, though its words could be.
    for part in () if get_origin(annotation) is Literal else get_args(annotation):
        yield from parts_of(part)
    for part in getattr(annotation, "__metadata__", ()):
        yield part


def _bounds(part: Any) -> Iterable[str]:
    if isinstance(part, FieldInfo):
        for inner in part.metadata:
            yield from _bounds(inner)
    elif isinstance(part, Gt):
        yield "above " + str(part.gt)
    elif isinstance(part, Ge):
        yield "at least " + str(part.ge)
    elif isinstance(part, Lt):
        yield "below " + str(part.lt)
    elif isinstance(part, Le) and part.le != MOST_INTEGER:  # that says how large a file's numbers may be
        yield "at most " + str(part.le)
    elif isinstance(part, MultipleOf):
        yield "a multiple of " + str(part.multiple_of)
