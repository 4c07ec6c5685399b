"""Before anything is encoded: which run this is, and in which folder it goes on."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from lora_utils import UserError
from lora_utils.config.doubts import doubts
from lora_utils.config.schema import RunConfig
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.vae import encoding_dtype
from lora_utils.precompute.plan import DataPlan, Encoding, plan_data
from lora_utils.storage.identity import data_digest, example_digests, run_identity
from lora_utils.storage.run_folder import RunPlace, choose_folder
from lora_utils.storage.run_note import RunNote, begin_note
from lora_utils.system.device import Precision, choose_precision, compute_capability
from lora_utils.system.launcher import contradictions, refuse_impossible
from lora_utils.system.ownership import Ownership, own
from lora_utils.system.versions import versions
from lora_utils.training.folders import stamp_inputs
from lora_utils.training.objective import training_schedule

LOGGER = logging.getLogger(__name__)
COMPARED_VERSIONS = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class PlannedRun:
    """A run of which nothing was encoded or loaded yet."""

    config: RunConfig
    """With the folder that was chosen."""
    base: PretrainedSdxl
    precision: Precision
    data: DataPlan
    note: RunNote
    """What it is."""
    accelerator: Accelerator
    """Device and processes; precision and accumulation are the loop's own."""
    is_complete: bool
    """All its steps are taken, and its LoRA is in the folder."""
    ownership: Ownership
    """Of the run folder, as long as somebody keeps it."""
    started: float
    """``time.monotonic`` when the stage began."""


def plan_run(config: RunConfig, give_way: Callable[[], object] | None = None) -> PlannedRun:
    """Measure the data, say what run this is, and choose its folder.

    Args:
        config: The settings.
        give_way: Ends the run, where the same process asks for its folder again.

    Raises:
        UserError: The data or the base model cannot be used, or the run folder is in use or another run's.
    """
    started = time.monotonic()
    refuse_impossible(torch.cuda.is_available())
    AcceleratorState._reset_state()  # else a second run in one notebook keeps the first one's processes
    # The launcher's precision and compilation are ours to decide; its device and processes are taken.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), dynamo_backend="no")

    # Before the data is read: a file that changes meanwhile must not pass for the one that was learned.
    inputs = stamp_inputs(config)
    base = PretrainedSdxl(config.model, config.paths.cache_dir)
    precision = choose_precision(config.model.mixed_precision, compute_capability())
    with accelerator.main_process_first():  # a data set of the Hub is downloaded once
        data = plan_encoding(config, base, precision)
    told = plan_doubts(config, base, precision, data.visits_per_epoch, accelerator.num_processes)
    note = describe_run(config, base, data, precision, accelerator.num_processes, inputs)
    steps = note.free["steps"]

    owned = [Ownership()]
    places: list[RunPlace | UserError | None] = [None]
    if accelerator.is_main_process:  # which alone writes

        def claim(folder: Path) -> None:
            owned[0] = own_run(folder, give_way)

        try:
            places = [choose_folder(config.paths, config.checkpoint, note, steps, claim)]
        except UserError as refusal:  # raised below, once the others know that there is nothing to wait for
            places = [refusal]
    # The others would take a folder that the first has begun for another run's.
    [place] = broadcast_object_list(places)
    if isinstance(place, UserError):
        raise place if accelerator.is_main_process else SystemExit(2)  # the first one says why
    assert place is not None
    if accelerator.is_main_process and not place.is_complete:
        for doubt in told:
            LOGGER.warning("%s", doubt)
        begin_note(place.folder, note)
    # Runs of one name share a cache: it is addressed by content.
    chosen = {"output_dir": place.folder, "precompute_dir": config.paths.cache_folder}
    paths = config.paths.model_copy(update=chosen)
    settled = config.model_copy(update={"paths": paths})
    return PlannedRun(settled, base, precision, data, note, accelerator, place.is_complete, owned[0], started)


def own_run(folder: Path, give_way: Callable[[], object] | None = None) -> Ownership:
    """Become the one writer to a run folder.

    Raises:
        InUseError: Another process is.
    """
    return own(folder, "trains into", "choose another output_dir", give_way)


def plan_encoding(config: RunConfig, base: PretrainedSdxl, precision: Precision) -> DataPlan:
    """The data as it is now; raises as ``plan_data``."""
    return plan_data(base, config.data, Encoding(precision.dtype, encoding_dtype(config.model)))


def plan_doubts(
    config: RunConfig, base: PretrainedSdxl, precision: Precision, visits_per_epoch: int, processes: int = 1
) -> list[str]:
    """What is most likely not meant, or not what accelerate launch says; known before an hour of encoding.

    Raises:
        UserError: The base model's timesteps or the learning rate's schedule cannot be had.
    """
    # Of the base, its scheduler's settings alone are read.
    training_schedule(base.load_noise_schedule(), config.train)
    train = config.train
    told = contradictions(precision.name, train.gradient_accumulation_steps, train.torch_compile)
    return told + doubts(config, visits_per_epoch, processes)


def describe_run(
    config: RunConfig,
    base: PretrainedSdxl,
    data: DataPlan,
    precision: Precision,
    processes: int = 1,
    inputs: str | None = None,
) -> RunNote:
    """What a run is, by what can be known before anything is encoded."""
    train = config.train
    facts = {
        "base": base.unet_identity(),
        "data": data_digest(data.entries, data.unconditional_key),
        "base_precision": config.model.base_precision,
        "precision": precision.name,
        # As it was asked for: another may take its place once the parameters are there.
        "optimizer": "adamw8bit" if train.use_8bit_adam else train.optimizer,
        "processes": processes,
        "steps": train.total_steps(data.visits_per_epoch, processes),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions(COMPARED_VERSIONS),
    }
    identity = run_identity(config.lora, train, config.data, facts)
    name = config.model.pretrained_model_name_or_path
    return RunNote(identity["fixed"], identity["free"], name, example_digests(data.entries), inputs)
