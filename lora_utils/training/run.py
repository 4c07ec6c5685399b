"""One training run, put together: examples, base model, adapter, precision."""

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from lora_utils.denoising import training_schedule
from lora_utils.findings import table
from lora_utils.fingerprints import data_digest
from lora_utils.fitting import FittedUnet
from lora_utils.microbatches import TrainingRun
from lora_utils.precomputing import Precomputed
from lora_utils.preflight import Precision
from lora_utils.schema import RunConfig
from lora_utils.sdxl import BaseModel
from lora_utils.validation import HeldOutLoss
from lora_utils.visits import CachedExamples

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    run: TrainingRun
    fitted: FittedUnet
    precision: Precision
    held_out: HeldOutLoss | None
    identity: dict[str, str]
    """base and data: what identifies the base's weights and the examples."""
    started: float
    """``time.monotonic`` when the stage began."""

    def measure(self) -> float:
        """The held-out loss of the U-Net as it is."""
        assert self.held_out is not None
        with self.run.autocast():
            return self.held_out.measure(self.run.unet, self.run.accelerator.device)

    def facts(self) -> dict[str, Any]:
        """For the run's summary."""
        run = self.run
        return {
            "max_train_steps": run.steps,
            "training_examples": len(run.examples),
            "held_out_examples": len(self.held_out) if self.held_out else 0,
            "mixed_precision": self.precision.name,
            "device": str(run.accelerator.device),
            "forecast_memory_gib": self.fitted.forecast_gib,
        }


def prepare(
    config: RunConfig, found: Precomputed, accelerator: Accelerator, precision: Precision, started: float | None = None
) -> Prepared:
    """Load and fit the U-Net for the examples in the cache.

    Args:
        config: Of the run.
        found: The cache.
        accelerator: Device and processes.
        precision: What the U-Net computes in.
        started: ``time.monotonic`` when the stage began; now, when not given.

    Raises:
        UserError: The base model or a setting cannot be used.
    """
    examples = CachedExamples(found.cache, [entry for entry in found.entries if not entry.held_out])
    held_out = CachedExamples(found.cache, [entry for entry in found.entries if entry.held_out])
    base = BaseModel(config.model, config.paths.cache_dir)
    schedule = training_schedule(base.load_noise_schedule(), config.train)
    shapes = Counter(entry.size for entry in examples.entries)
    fitted = FittedUnet(config, shapes, precision, accelerator.device)
    run = TrainingRun(
        accelerator.prepare_model(fitted.unet),
        precision.dtype,
        examples,
        found.cache.read(found.unconditional_key),
        config.data.caption_dropout_rate,
        config.data.latent_mode,
        schedule,
        config.train,
        accelerator,
        fitted.make_room,
    )
    measured = HeldOutLoss(held_out, schedule) if held_out else None
    identity = {"base": base.unet_identity(), "data": data_digest(found.entries, found.unconditional_key)}
    began = time.monotonic() if started is None else started
    return Prepared(run, fitted, precision, measured, identity, began)


def warn_of_findings(config: RunConfig, found: Precomputed) -> None:
    """Say what is left out of training, and where the remarks on the rest are."""
    refused = [finding for finding in found.findings if finding.kind == "refused"]
    if refused:
        LOGGER.warning("%d examples are left out:\n%s", len(refused), table(refused))
    if len(found.findings) > len(refused):
        count, report = len(found.findings) - len(refused), config.paths.output_dir / "data_report.csv"
        LOGGER.warning("%d remarks on what is used, such as cut captions and turned pictures: %s", count, report)
