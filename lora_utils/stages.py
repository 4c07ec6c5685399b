"""The stages: check, precompute, train, compare. Each is one function of the whole config.

Never two of {VAE, text encoders, U-Net} are in memory together, in any stage.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from lora_utils import cards, lora, redaction, sampling
from lora_utils.config import dump_config, load_config
from lora_utils.course import carry_out
from lora_utils.dataset import find_examples
from lora_utils.examining import examine
from lora_utils.files import commit_file, write_atomically
from lora_utils.findings import as_csv
from lora_utils.lint import DataReport, lint
from lora_utils.memory import DTYPES
from lora_utils.outlook import Outlook, look_ahead
from lora_utils.precomputing import Encoding, Precomputed, fill_cache
from lora_utils.preflight import choose_precision, choose_preset, count_examples, describe
from lora_utils.restoring import restore
from lora_utils.runlog import read_summary
from lora_utils.runs import Prepared, prepare, warn_of_findings
from lora_utils.sampling import Settings, Shot, draw_pairs
from lora_utils.schema import RunConfig
from lora_utils.sdxl import BaseModel
from lora_utils.sources.examples import DataError
from lora_utils.tiny.demo_data import draw_demo_data
from lora_utils.training import StepReport

LOGGER = logging.getLogger(__name__)
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Comparison:
    """Base model and LoRA on equal seeds."""

    folder: Path
    shots: list[Shot]
    baseline: list[Image.Image]
    finetuned: list[Image.Image]
    sheet: Image.Image


@dataclass(frozen=True)
class Check:
    """What ``check`` found; prints as text."""

    machine: str
    """Card, precision, memory, disk, data, versions; empty where another card was asked about."""
    outlook: Outlook
    config: str
    """Every setting, as YAML; empty likewise."""

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self.machine, str(self.outlook), self.config) if part)


def configure(preset: str = "auto", overrides: Mapping[str, Any] | None = None, **fields: Any) -> RunConfig:
    """The config of a notebook: a preset, the fields of its form that are filled in, then the overrides.

    Args:
        preset: Name of a file in configs/, or auto.
        overrides: Any settings by leaf name.
        fields: Settings too; empty ones are left to the preset. Without train_data_dir and dataset_name the demo
            pictures are drawn.

    Raises:
        UserError: The preset or a setting is unknown or impossible.
    """
    redaction.install()
    file = CONFIGS / f"{choose_preset(preset)}.yaml"
    given = {name: value for name, value in fields.items() if value not in ("", None, [])}
    config = load_config(file, given | dict(overrides or {}))
    side_px = min(config.data.resolution)
    demo = Path(f"data/demo_{side_px}px")
    if config.data.train_data_dir is None and config.data.dataset_name is None:
        config = load_config(file, given | dict(overrides or {}) | {"train_data_dir": demo})
    if config.data.train_data_dir == [demo] and not demo.exists():
        draw_demo_data(demo, side_px)
    return config


def check(config: RunConfig, card: str | None = None) -> Check:
    """What this machine is, and what a run will need on its card or on another one; downloads nothing.

    Args:
        config: Of the run.
        card: t4, l4, a100, 8gb and so on; what is here when not given.

    Raises:
        UserError: The machine cannot do what the settings ask for, the data cannot be used, or no card has this name.
    """
    if card:
        return Check("", look_ahead(config, cards.card(card), count_examples(config)), "")
    machine, here = describe(config), cards.card_at_hand(choose_precision(config.model.mixed_precision).dtype)
    return Check(machine, look_ahead(config, here, count_examples(config)), dump_config(config))


def check_data(config: RunConfig) -> DataReport:
    """Decode every image and read every caption, and say what is wrong before any weight is loaded.

    Raises:
        UserError: There is no data, or a setting is impossible.
    """
    return lint(config, BaseModel(config.model, config.paths.cache_dir))


def precompute(config: RunConfig) -> Precomputed:
    """Encode every image and every caption that the cache lacks: first captions, then images.

    What cannot be used is left out and named in the findings, and in data_report.csv in the run folder.

    Raises:
        UserError: No data or the base model cannot be used; what was encoded until then is kept.
    """
    found = find_examples(config.data)
    examined, findings = examine(found.examples, config.data)
    if config.paths.output_dir.is_file():
        raise DataError(f"output_dir {config.paths.output_dir} is a file; choose a folder")
    _bring_back(config)
    base = BaseModel(config.model, config.paths.cache_dir)
    text_dtype = choose_precision(config.model.mixed_precision).dtype
    encoding = Encoding(text_dtype, DTYPES[config.model.vae_precision])
    result = fill_cache(_cache_folder(config), examined, found.findings + findings, base, config.data, encoding)
    write_atomically(config.paths.output_dir / "data_report.csv", as_csv(result.findings))
    return result


def train(config: RunConfig) -> Iterator[StepReport]:
    """Train the adapter on the precomputed examples, encoding first what is missing; yields after every step.

    Goes on from a checkpoint where ``resume_from_checkpoint`` says so. A checkpoint and
    ``pytorch_lora_weights.safetensors`` are written at the end, and when the caller stops early or is interrupted.

    Raises:
        UserError: The data, the base model or a setting cannot be used, or the loss diverged.
    """
    prepared = prepare_training(config)
    yield from carry_out(config, prepared)


def ensure_trained(config: RunConfig) -> Path:
    """The LoRA of the run folder, trained first, or further, where the run is not complete."""
    file = config.paths.output_dir / lora.WEIGHTS_NAME
    if not file.exists() or read_summary(config.paths.output_dir).get("status") not in (None, "done"):
        for _ in train(config):
            pass
    return file


def compare(config: RunConfig) -> Comparison:
    """Draw every prompt on every seed with the base model, then with the LoRA; write PNGs and a sheet.

    Raises:
        UserError: The base model or the LoRA cannot be used; nothing is written then.
    """
    settings = Settings(
        *config.data.resolution,
        config.compare.num_inference_steps,
        config.compare.guidance_scale,
        config.compare.negative_prompt,
        config.data.max_token_length,
        config.train.rescale_betas_zero_snr,
    )
    file = lora.find_lora(config.compare.lora_path or config.paths.output_dir)
    shots = [Shot(prompt, seed) for prompt in config.compare.prompt for seed in config.compare.seeds]
    base = BaseModel(config.model, config.paths.cache_dir)
    dtype = choose_precision(config.model.mixed_precision).dtype
    baseline, finetuned = draw_pairs(base, file, shots, settings, config.compare.adapter_scale, dtype)
    rows = {"base": baseline, f"LoRA × {config.compare.adapter_scale:g}": finetuned}
    sheet = sampling.contact_sheet(shots, rows)
    folder = config.paths.infer_path or config.paths.output_dir / "compare"
    for name, images, scale in (("baseline", baseline, 0.0), ("finetuned", finetuned, config.compare.adapter_scale)):
        for index, (shot, image) in enumerate(zip(shots, images, strict=True)):
            path = folder / f"{name}_{index:03d}_seed{shot.seed}.png"
            sampling.save_image(image, path, shot, settings, scale)
    commit_file(folder / "sheet.png", lambda file: sheet.save(file, "PNG"))
    write_atomically(folder / "config.yaml", dump_config(config).encode())
    return Comparison(folder, shots, baseline, finetuned, sheet)


def prepare_training(config: RunConfig) -> Prepared:
    """Everything that ``train`` does before its first step; raises as it does."""
    precision, started = choose_precision(config.model.mixed_precision), time.monotonic()
    AcceleratorState._reset_state()  # else a second run in one notebook keeps the first one's processes
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    with accelerator.main_process_first():
        found = precompute(config)
    if accelerator.is_main_process:
        warn_of_findings(config, found)
    return prepare(config, found, accelerator, precision, started)


def _bring_back(config: RunConfig) -> None:
    """What the mirror has of a run that goes on, onto a machine that has nothing of it."""
    mirror_dir, output_dir = config.checkpoint.mirror_dir, config.paths.output_dir
    if mirror_dir is None or config.checkpoint.resume_from_checkpoint != "latest":
        return
    found = restore(mirror_dir, output_dir, _cache_folder(config))
    if found is None:
        return
    for problem in found.skipped:
        LOGGER.warning("%s", problem)
    step = "no checkpoint yet" if found.step is None else f"the checkpoint of step {found.step}"
    LOGGER.warning("brought back from the mirror in %s: %s and %d files of the cache", mirror_dir, step, found.packs)


def _cache_folder(config: RunConfig) -> Path:
    return config.paths.precompute_dir or config.paths.output_dir / "precomputed"
