"""The stages: check, precompute, train, compare. Each is one function of the whole config.

Never two of {VAE, text encoders, U-Net} are in memory together, in any stage.
"""

import logging
import os
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from lora_utils.checking import Check, check, check_data
from lora_utils.compare import comparison
from lora_utils.compare.comparison import Comparison, ComparisonPlan
from lora_utils.compare.sampling import SamplingSettings, Shot, draw_pairs
from lora_utils.config.loading import dump_config
from lora_utils.config.schema import RunConfig
from lora_utils.config.trained import as_trained, run_settings
from lora_utils.data.examples import DataError
from lora_utils.data.findings import as_csv
from lora_utils.memory.machine import unwritable_among
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.lora import find_lora
from lora_utils.precompute.fill import Precomputed, fill_cache, warn_of_findings
from lora_utils.precompute.plan import DataPlan
from lora_utils.storage.log import PICTURES
from lora_utils.storage.mirror_restore import restore_if_wanted
from lora_utils.storage.run_folder import require_same_data
from lora_utils.storage.run_note import RunNote, note_steps
from lora_utils.storage.store import mirror_complete_run
from lora_utils.system.determinism import deterministic_algorithms
from lora_utils.system.device import Precision, choose_precision, compute_capability
from lora_utils.system.device_memory import device_given_back
from lora_utils.system.files import file_hash, write_atomically
from lora_utils.system.progress import announce
from lora_utils.training import loop
from lora_utils.training.folders import completed_run, find_run
from lora_utils.training.loop import StepReport
from lora_utils.training.recording import open_mirror_of
from lora_utils.training.run import TrainingRun, prepare
from lora_utils.training.start import PlannedRun, describe_run, own_run, plan_doubts, plan_encoding, plan_run

__all__ = ["Check", "check", "check_data", "compare", "precompute", "prepare_training", "train"]

LOGGER = logging.getLogger(__name__)
REPORT_NAME = "data_report.csv"
ROOM_TO_ENCODE = "end other programs that use it, or set vae_batch_size=1 or vae_precision=fp16"
ROOM_TO_TRAIN = (
    "end other programs that use it, or set base_precision=nf4, a lower resolution or a smaller "
    "train_batch_size; what was finished is kept"
)
ROOM_TO_DRAW = "end other programs that use it, or set base_precision=nf4 or a lower resolution"


@device_given_back(ROOM_TO_ENCODE)
def precompute(config: RunConfig) -> Precomputed:
    """Encode every image and every caption that the cache lacks: first captions, then images.

    What cannot be used is left out and named in the findings, and in data_report.csv in the run folder.

    Raises:
        UserError: No data or the base model cannot be used; what was encoded until then is kept.
    """
    _require_folder(config)
    base = _base(config)
    precision = _precision(config)
    plan = plan_encoding(config, base, precision)
    for doubt in plan_doubts(config, base, precision, plan.visits_per_epoch):
        LOGGER.warning("%s", doubt)
    note = describe_run(config, base, plan, precision)
    require_same_data(config.paths, config.checkpoint, note)
    with own_run(config.paths.run_folder):
        return _encode(config, base, plan, note)


def train(config: RunConfig) -> Iterator[StepReport]:
    """Train the adapter on the precomputed examples, encoding first what is missing; yields after every step.

    Goes on from a checkpoint where ``resume_from_checkpoint`` says so. A checkpoint and
    ``pytorch_lora_weights.safetensors`` are written at the end, and when the caller stops early or is
    interrupted.

    Raises:
        UserError: The data, the base model or a setting cannot be used, or the loss diverged.
    """

    def end() -> None:
        if (running := itself()) is not None:
            running.close()

    reports = _train(config, end)
    # Weakly: whoever stops in the middle drops the last reference, and that ends the run at once.
    itself = weakref.ref(reports)
    return reports


def _train(config: RunConfig, give_way: Callable[[], object]) -> Generator[StepReport, None, None]:
    with deterministic_algorithms(config.train.deterministic):
        yield from _train_what_is_left(config, give_way)


def _train_what_is_left(
    config: RunConfig, give_way: Callable[[], object]
) -> Generator[StepReport, None, None]:
    folder = completed_run(config)
    if folder is None:
        _require_folder(config)
        planned = plan_run(config, give_way)
        if not planned.is_complete:
            with planned.ownership, device_given_back(ROOM_TO_TRAIN):
                yield from loop.train(planned.config, _prepare(planned))
            return
        folder = planned.config.paths.run_folder
        # The mirror may lack a part of a run that is complete here.
        if planned.accelerator.is_main_process and (mirror := open_mirror_of(planned.config)):
            with planned.ownership:
                mirror_complete_run(mirror, folder)
    LOGGER.warning("%s is complete; more max_train_steps would go on, other settings are another run", folder)


@device_given_back(ROOM_TO_DRAW)
def compare(config: RunConfig) -> Comparison:
    """Draw every prompt on every seed with the base model and with the LoRA; write PNGs and a sheet.

    Base, VAE and resolution are those of the run that made the LoRA, where the config names no others.

    Raises:
        UserError: The base model or the LoRA cannot be used, or the pictures cannot be written; that is tried
            first, and nothing is written then.
        KeyboardInterrupt: It came; what is drawn until then is written first, and the message says where.
    """
    # Before any model is loaded: a missing LoRA is the usual mistake.
    lora_file = find_lora(config.compare.lora_path or find_run(config))
    learned = run_settings(lora_file.parent)
    folder = _picture_folder(config, lora_file, is_of_run=learned is not None)
    if learned:
        config = as_trained(config, learned, lora_file.parent)
    plan = _plan_comparison(config, lora_file, folder)
    plan.require_writable()

    announce(f"drawing {plan} into {folder}, by {config.model.pretrained_model_name_or_path} and {lora_file}")
    base = _base(config)
    base.examine()
    dtype = _precision(config).dtype
    pictures = draw_pairs(base, lora_file, plan.shots, plan.settings, plan.adapter_scale, dtype)
    return comparison.write(plan, pictures)


def _picture_folder(config: RunConfig, lora_file: Path, is_of_run: bool) -> Path:
    """Where the pictures go: beside the weights that they are of, unless another folder was given."""
    paths = config.paths
    if paths.infer_path:
        return paths.infer_path
    is_beside = paths.output_dir is None and (is_of_run or config.compare.lora_path is None)
    return (lora_file.parent if is_beside else paths.run_folder) / PICTURES


def _plan_comparison(config: RunConfig, lora_file: Path, folder: Path) -> ComparisonPlan:
    settings = SamplingSettings(
        *config.data.resolution,
        config.compare.num_inference_steps,
        config.compare.guidance_scale,
        config.compare.negative_prompt,
        config.data.max_token_length,
        config.train.rescale_betas_zero_snr,
    )
    # What is named twice would be drawn twice under one name.
    seeds = dict.fromkeys(config.compare.seeds)
    shots = [Shot(prompt, seed) for prompt in dict.fromkeys(config.compare.prompt) for seed in seeds]
    named = config.compare.model_copy(update={"lora_path": lora_file})
    resolved = dump_config(config.model_copy(update={"compare": named}))
    return ComparisonPlan(
        folder, shots, settings, config.compare.adapter_scale, file_hash(lora_file), resolved
    )


def prepare_training(config: RunConfig) -> TrainingRun:
    """Everything that ``train`` does before its first step; raises as it does."""
    _require_folder(config)
    return _prepare(plan_run(config))


def _prepare(planned: PlannedRun) -> TrainingRun:
    config = planned.config
    accelerator = planned.accelerator
    with accelerator.main_process_first():  # which encodes; the others find all of it in the cache
        precomputed = _encode(config, planned.base, planned.data, planned.note)
    if accelerator.is_main_process:
        warn_of_findings(precomputed, config.paths.run_folder / REPORT_NAME)
    run = prepare(config, planned.base, precomputed, accelerator, planned.precision, planned.started)
    if accelerator.is_main_process:
        note_steps(config.paths.run_folder, run.steps)
    return run


def _encode(config: RunConfig, base: PretrainedSdxl, plan: DataPlan, note: RunNote) -> Precomputed:
    folder = config.paths.run_folder
    # Before the cache is opened: what the mirror has of it need not be encoded again.
    identity = {"fixed": note.fixed, "free": note.free}
    restore_if_wanted(
        config.checkpoint, folder, config.paths.cache_folder, identity, config.paths.common_name
    )
    precomputed = fill_cache(config.paths.cache_folder, plan, base, config.data)
    write_atomically(folder / REPORT_NAME, as_csv(precomputed.findings))
    return precomputed


def _require_folder(config: RunConfig) -> None:
    # What check fails, before anything is encoded. But a cache may be full and read alone, and a drive that
    # is away for a moment is waited for.
    cache = config.paths.precompute_dir
    made = None if cache is None or cache.is_dir() else cache
    mirror = config.checkpoint.mirror_dir
    blocked = mirror if mirror and any(map(os.path.isfile, (mirror, *mirror.parents))) else None
    folders = {"output_dir": config.paths.run_folder, "precompute_dir": made, "mirror_dir": blocked}
    if problems := unwritable_among(folders):
        raise DataError("; ".join(problems))


def _base(config: RunConfig) -> PretrainedSdxl:
    return PretrainedSdxl(config.model, config.paths.cache_dir)


def _precision(config: RunConfig) -> Precision:
    return choose_precision(config.model.mixed_precision, compute_capability())
