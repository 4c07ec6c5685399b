"""The stages: check, precompute, train, compare. Each is one function of the whole config.

Never two of {VAE, text encoders, U-Net} are in memory together, in any stage.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from lora_utils.compare import png
from lora_utils.compare import sheet as sheet_module
from lora_utils.compare.sampling import SamplingSettings, Shot, draw_pairs
from lora_utils.config.loading import dump_config
from lora_utils.config.schema import RunConfig
from lora_utils.data.dataset import count_examples, describe_data, find_examples
from lora_utils.data.examples import DataError
from lora_utils.data.findings import as_csv
from lora_utils.data.inspection import inspect_examples
from lora_utils.memory import cards
from lora_utils.memory.advice import JudgedForecast, judge_run
from lora_utils.memory.machine import describe
from lora_utils.model import lora
from lora_utils.model.base import PretrainedSdxl
from lora_utils.precompute.data_report import DataReport, report_on_data
from lora_utils.precompute.fill import Encoding, Precomputed, cache_folder, fill_cache, warn_of_findings
from lora_utils.storage.mirror_restore import restore_if_wanted
from lora_utils.system.device import DTYPES, choose_precision, compute_capability
from lora_utils.system.files import commit_file, write_atomically
from lora_utils.training import loop
from lora_utils.training.loop import StepReport
from lora_utils.training.run import Prepared, prepare

LOGGER = logging.getLogger(__name__)


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
    outlook: JudgedForecast
    config: str
    """Every setting, as YAML; empty likewise."""

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self.machine, str(self.outlook), self.config) if part)


def check(config: RunConfig, card: str | None = None) -> Check:
    """What this machine is, and what a run will need on its card or on another one; downloads nothing.

    Args:
        config: Of the run.
        card: t4, l4, a100, 8gb and so on; what is here when not given.

    Raises:
        UserError: The machine cannot do what the settings ask for, the data cannot be used, or no card has this name.
    """
    if card:
        return Check("", judge_run(config, cards.find_card(card), count_examples(config)), "")
    machine, here = (
        describe(config.model, config.paths, describe_data(config)),
        cards.card_here(choose_precision(config.model.mixed_precision, compute_capability()).dtype),
    )
    return Check(machine, judge_run(config, here, count_examples(config)), dump_config(config))


def check_data(config: RunConfig) -> DataReport:
    """Decode every image and read every caption, and say what is wrong before any weight is loaded.

    Raises:
        UserError: There is no data, or a setting is impossible.
    """
    return report_on_data(config, PretrainedSdxl(config.model, config.paths.cache_dir))


def precompute(config: RunConfig) -> Precomputed:
    """Encode every image and every caption that the cache lacks: first captions, then images.

    What cannot be used is left out and named in the findings, and in data_report.csv in the run folder.

    Raises:
        UserError: No data or the base model cannot be used; what was encoded until then is kept.
    """
    found = find_examples(config.data)
    examined, findings = inspect_examples(found.examples, config.data)
    if config.paths.output_dir.is_file():
        raise DataError(f"output_dir {config.paths.output_dir} is a file; choose a folder")
    restore_if_wanted(config)
    base = PretrainedSdxl(config.model, config.paths.cache_dir)
    text_dtype = choose_precision(config.model.mixed_precision, compute_capability()).dtype
    encoding = Encoding(text_dtype, DTYPES[config.model.vae_precision])
    result = fill_cache(
        cache_folder(config), examined, found.findings + findings, base, config.data, encoding
    )
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
    yield from loop.train(config, prepared)


def compare(config: RunConfig) -> Comparison:
    """Draw every prompt on every seed with the base model, then with the LoRA; write PNGs and a sheet.

    Raises:
        UserError: The base model or the LoRA cannot be used; nothing is written then.
    """
    settings = SamplingSettings(
        *config.data.resolution,
        config.compare.num_inference_steps,
        config.compare.guidance_scale,
        config.compare.negative_prompt,
        config.data.max_token_length,
        config.train.rescale_betas_zero_snr,
    )
    file = lora.find_lora(config.compare.lora_path or config.paths.output_dir)
    shots = [Shot(prompt, seed) for prompt in config.compare.prompt for seed in config.compare.seeds]
    base = PretrainedSdxl(config.model, config.paths.cache_dir)
    dtype = choose_precision(config.model.mixed_precision, compute_capability()).dtype
    baseline, finetuned = draw_pairs(base, file, shots, settings, config.compare.adapter_scale, dtype)
    rows = {"base": baseline, f"LoRA × {config.compare.adapter_scale:g}": finetuned}
    sheet = sheet_module.contact_sheet(shots, rows)
    folder = config.paths.infer_path or config.paths.output_dir / "compare"
    for name, images, scale in (
        ("baseline", baseline, 0.0),
        ("finetuned", finetuned, config.compare.adapter_scale),
    ):
        for index, (shot, image) in enumerate(zip(shots, images, strict=True)):
            path = folder / f"{name}_{index:03d}_seed{shot.seed}.png"
            png.save_image(image, path, shot, settings, scale)
    commit_file(folder / "sheet.png", lambda file: sheet.save(file, "PNG"))
    write_atomically(folder / "config.yaml", dump_config(config).encode())
    return Comparison(folder, shots, baseline, finetuned, sheet)


def prepare_training(config: RunConfig) -> Prepared:
    """Everything that ``train`` does before its first step; raises as it does."""
    precision, started = (
        choose_precision(config.model.mixed_precision, compute_capability()),
        time.monotonic(),
    )
    AcceleratorState._reset_state()  # else a second run in one notebook keeps the first one's processes
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    with accelerator.main_process_first():
        found = precompute(config)
    if accelerator.is_main_process:
        warn_of_findings(config, found)
    return prepare(config, found, accelerator, precision, started)
