"""One training run from the cache to the adapter's file: put together, watched, logged, saved."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import Accelerator

from lora_utils import lora
from lora_utils.config import dump_config
from lora_utils.denoising import training_schedule
from lora_utils.findings import table
from lora_utils.fitting import FittedUnet
from lora_utils.memory import forget_peak_memory
from lora_utils.precomputing import Precomputed
from lora_utils.preflight import Precision
from lora_utils.progress import progress_bar
from lora_utils.runlog import RunLog, SilentLog
from lora_utils.schema import RunConfig
from lora_utils.sdxl import BaseModel
from lora_utils.training import StepReport, Trainer, TrainingRun
from lora_utils.validation import HeldOutLoss
from lora_utils.visits import CachedExamples

LOGGER = logging.getLogger(__name__)
FULL_STEP = 2  # the first step runs before the optimiser has made its states


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    run: TrainingRun
    fitted: FittedUnet
    precision: Precision
    held_out: HeldOutLoss | None

    def measure(self) -> float:
        """The held-out loss of the U-Net as it is."""
        assert self.held_out is not None
        with self.run.autocast():
            return self.held_out.measure(self.run.unet, self.run.accelerator.device)


def prepare(config: RunConfig, found: Precomputed, accelerator: Accelerator, precision: Precision) -> Prepared:
    """Load and fit the U-Net for the examples in the cache.

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
    return Prepared(run, fitted, precision, HeldOutLoss(held_out, schedule) if held_out else None)


def carry_out(config: RunConfig, prepared: Prepared) -> Iterator[StepReport]:
    """Take the steps; logs, measures, corrects the plan, and saves the adapter however the run ends."""
    run, fitted, is_main = prepared.run, prepared.fitted, prepared.run.accelerator.is_main_process
    trainer = Trainer(run)
    new_log = RunLog if is_main else SilentLog
    with new_log(config.paths.output_dir, dump_config(config)) as log:
        log.summarise(**_facts(prepared))
        if prepared.held_out:
            before = prepared.measure()
            log.add({"step": 0, "held_out_loss": before})
            log.summarise(held_out_loss_before=before)
        started, report = time.monotonic(), None
        forget_peak_memory()
        bar = progress_bar(trainer.steps(), "train", run.steps, shown=is_main)
        try:
            for report in bar:
                report = _watch(prepared, trainer, report)
                log.add(asdict(report) | {"forecast_memory_gib": fitted.forecast_gib})
                if report.held_out_loss is not None:
                    log.summarise(held_out_loss=report.held_out_loss)
                bar.set_postfix_str(_describe(report, fitted), refresh=False)
                yield report
        finally:
            bar.close()
            if report and is_main:
                with trainer.averaged():
                    weights = lora.save_lora(run.accelerator.unwrap_model(run.unet), config.paths.output_dir)
                log.summarise(steps=report.step, loss=report.loss, peak_memory_gib=report.peak_memory_gib)
                log.summarise(recompute=str(fitted.plan), forecast_memory_gib=fitted.forecast_gib)
                log.summarise(seconds=round(time.monotonic() - started, 1), weights=str(weights))


def warn_of_findings(config: RunConfig, found: Precomputed) -> None:
    """Say what is left out of training, and where the remarks on the rest are."""
    refused = [finding for finding in found.findings if finding.kind == "refused"]
    if refused:
        LOGGER.warning("%d examples are left out:\n%s", len(refused), table(refused))
    if len(found.findings) > len(refused):
        count, report = len(found.findings) - len(refused), config.paths.output_dir / "data_report.csv"
        LOGGER.warning("%d remarks on what is used, such as cut captions and turned pictures: %s", count, report)


def _watch(prepared: Prepared, trainer: Trainer, report: StepReport) -> StepReport:
    run, measured_gib = prepared.run, report.peak_memory_gib
    if report.step == FULL_STEP and measured_gib and (changed := prepared.fitted.correct(measured_gib)):
        LOGGER.warning("step %d: %s", report.step, changed)
        forget_peak_memory()
    if prepared.held_out and (report.step % run.config.validation_steps == 0 or report.step == run.steps):
        with trainer.averaged():
            return replace(report, held_out_loss=prepared.measure())
    return report


def _facts(prepared: Prepared) -> dict[str, Any]:
    run, held_out = prepared.run, prepared.held_out
    return {
        "max_train_steps": run.steps,
        "training_examples": len(run.examples),
        "held_out_examples": len(held_out) if held_out else 0,
        "mixed_precision": prepared.precision.name,
        "device": str(run.accelerator.device),
        "recompute": str(prepared.fitted.plan),
        "forecast_memory_gib": prepared.fitted.forecast_gib,
    }


def _describe(report: StepReport, fitted: FittedUnet) -> str:
    parts = [f"loss {report.loss:.4f}", f"{report.step_seconds:.2f} s/step"]
    if report.data_seconds >= 0.1 * report.step_seconds:
        parts.append(f"of it {report.data_seconds:.2f} s data")
    if report.peak_memory_gib:
        expected = f" ({fitted.forecast_gib:.1f} expected)" if fitted.forecast_gib else ""
        parts.append(f"{report.peak_memory_gib:.1f} GiB{expected}")
    return ", ".join(parts)
