"""The stages: check, precompute, train, compare. Each is one function of the whole config.

Never two of {VAE, text encoders, U-Net} are in memory together, in any stage.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lora_utils.compare import comparison
from lora_utils.compare.comparison import Comparison
from lora_utils.compare.sampling import SamplingSettings, Shot, draw_pairs
from lora_utils.config.loading import dump_config
from lora_utils.config.schema import RunConfig
from lora_utils.data.dataset import describe_data, find_examples, look_for_examples
from lora_utils.data.examples import DataError
from lora_utils.data.findings import as_csv
from lora_utils.data.inspection import inspect_examples
from lora_utils.memory.advice import JudgedForecast, judge_run
from lora_utils.memory.cards import card_here, find_card
from lora_utils.memory.forecast import Forecast
from lora_utils.memory.machine import describe
from lora_utils.memory.simulation import SimulationError
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.lora import find_lora
from lora_utils.model.vae import encoding_dtype
from lora_utils.precompute.data_report import DataReport, report_on_data
from lora_utils.precompute.fill import Encoding, Precomputed, fill_cache, warn_of_findings
from lora_utils.storage.mirror_restore import restore_if_wanted
from lora_utils.system.device import Precision, choose_precision, compute_capability
from lora_utils.system.files import write_atomically
from lora_utils.training import loop
from lora_utils.training.loop import StepReport
from lora_utils.training.run import TrainingRun, prepare

REPORT_NAME = "data_report.csv"


@dataclass(frozen=True)
class Check:
    """What ``check`` found; prints as text."""

    machine: str
    """Card, precision, memory, disk, data, versions; empty where another card was asked about."""
    judged: JudgedForecast | SimulationError
    """What will fit, or why that cannot be said with this torch."""
    config: str
    """Every setting, as YAML; empty likewise."""

    @property
    def forecast(self) -> Forecast:
        """What every stage needs on the card.

        Raises:
            SimulationError: This torch cannot be simulated.
        """
        if isinstance(self.judged, SimulationError):
            raise self.judged
        return self.judged.forecast

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self.machine, str(self.judged), self.config) if part)


def check(config: RunConfig, card: str | None = None) -> Check:
    """What this machine is, and what a run will need on its card or on another one; downloads nothing.

    Args:
        config: The run that is asked about.
        card: t4, l4, a100, 8gb and so on; what is here when not given.

    Raises:
        UserError: The machine cannot do what the settings ask for, the data cannot be used, or no card has
            this name.
    """
    found_examples = look_for_examples(config.data)
    examples = len(found_examples.examples) if found_examples else None
    if card:
        return Check("", judge_run(config, find_card(card), examples), "")
    machine = describe(config.model, config.paths, describe_data(config.data, found_examples))
    here = card_here(_precision(config).dtype)
    try:
        judged = judge_run(config, here, examples)
    except SimulationError as error:  # all the rest of the check is worth having without a forecast
        judged = error
    return Check(machine, judged, dump_config(config))


def check_data(config: RunConfig) -> DataReport:
    """Decode every image and read every caption, and say what is wrong before any weight is loaded.

    Raises:
        UserError: There is no data, or a setting is impossible.
    """
    return report_on_data(config.data, config.train, _base(config))


def precompute(config: RunConfig) -> Precomputed:
    """Encode every image and every caption that the cache lacks: first captions, then images.

    What cannot be used is left out and named in the findings, and in data_report.csv in the run folder.

    Raises:
        UserError: No data or the base model cannot be used; what was encoded until then is kept.
    """
    return _precompute(config, _base(config), _precision(config))


def train(config: RunConfig) -> Iterator[StepReport]:
    """Train the adapter on the precomputed examples, encoding first what is missing; yields after every step.

    Goes on from a checkpoint where ``resume_from_checkpoint`` says so. A checkpoint and
    ``pytorch_lora_weights.safetensors`` are written at the end, and when the caller stops early or is
    interrupted.

    Raises:
        UserError: The data, the base model or a setting cannot be used, or the loss diverged.
    """
    yield from loop.train(config, prepare_training(config))


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
    # Before any model is loaded: a missing LoRA is the usual mistake.
    lora_file = find_lora(config.compare.lora_path or config.paths.run_folder)
    shots = [Shot(prompt, seed) for prompt in config.compare.prompt for seed in config.compare.seeds]
    adapter_scale = config.compare.adapter_scale
    dtype = _precision(config).dtype
    baseline, finetuned = draw_pairs(_base(config), lora_file, shots, settings, adapter_scale, dtype)

    folder = config.paths.infer_path or config.paths.run_folder / "compare"
    drawn = comparison.write(folder, shots, settings, baseline, finetuned, adapter_scale)
    write_atomically(folder / "config.yaml", dump_config(config).encode())
    return drawn


def prepare_training(config: RunConfig) -> TrainingRun:
    """Everything that ``train`` does before its first step; raises as it does."""
    started = time.monotonic()
    base = _base(config)
    precision = _precision(config)
    AcceleratorState._reset_state()  # else a second run in one notebook keeps the first one's processes
    # Precision and accumulation are the loop's own; of accelerate it takes device and processes.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())

    with accelerator.main_process_first():  # which encodes; the others find all of it in the cache
        precomputed = _precompute(config, base, precision)
    if accelerator.is_main_process:
        warn_of_findings(precomputed, config.paths.run_folder / REPORT_NAME)
    return prepare(config, base, precomputed, accelerator, precision, started)


def _precompute(config: RunConfig, base: PretrainedSdxl, precision: Precision) -> Precomputed:
    found_examples = find_examples(config.data)
    inspected, findings = inspect_examples(found_examples.examples, config.data)
    output_dir = config.paths.run_folder
    # Said before minutes of encoding, not after.
    if output_dir.is_file():
        raise DataError(f"output_dir {output_dir} is a file; choose a folder")

    folder = config.paths.cache_folder
    # Before the cache is opened: what the mirror has of it need not be encoded again.
    restore_if_wanted(config.checkpoint, output_dir, folder)
    encoding = Encoding(precision.dtype, encoding_dtype(config.model))
    precomputed = fill_cache(
        folder, inspected, found_examples.findings + findings, base, config.data, encoding
    )
    write_atomically(output_dir / REPORT_NAME, as_csv(precomputed.findings))
    return precomputed


def _base(config: RunConfig) -> PretrainedSdxl:
    return PretrainedSdxl(config.model, config.paths.cache_dir)


def _precision(config: RunConfig) -> Precision:
    return choose_precision(config.model.mixed_precision, compute_capability())
