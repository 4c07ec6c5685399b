"""One training run under way, step by step: watched, logged, kept."""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from lora_utils import lora
from lora_utils.config import dump_config
from lora_utils.fingerprints import fingerprint
from lora_utils.interruption import StopRequest
from lora_utils.keeping import Keeper, Resumed
from lora_utils.memory import forget_peak_memory
from lora_utils.mirror import Mirror
from lora_utils.outlook import what_helps
from lora_utils.progress import progress_bar
from lora_utils.runlog import RunLog, SilentLog, versions
from lora_utils.runs import Prepared
from lora_utils.schema import RunConfig
from lora_utils.training import DivergenceError, MemoryFullError, StepReport, Trainer

LOGGER = logging.getLogger(__name__)
HELPS = 3
FULL_STEP = 2  # the first step runs before the optimiser has made its states


def carry_out(config: RunConfig, prepared: Prepared) -> Iterator[StepReport]:
    """Take the steps that are left: measure, correct the plan, log, make checkpoints, save the adapter at the end.

    Raises:
        UserError: The checkpoint to go on from cannot be used, no step fits the GPU, or the loss diverged.
        KeyboardInterrupt: After SIGINT or SIGTERM, once the step is finished and kept.
    """
    accelerator = prepared.run.accelerator
    trainer = Trainer(prepared.run)
    keeper = _keeper(config, prepared, trainer)
    with accelerator.main_process_first():
        resumed = keeper.resume(trainer, accelerator.is_main_process)
    keeper.require_space(trainer)
    new_log = RunLog if accelerator.is_main_process else SilentLog
    with new_log(config.paths.output_dir, dump_config(config), resumed.metrics) as log:
        course = Course(config, prepared, trainer, keeper, log)
        course.begin(resumed)
        try:
            while (report := course.advance()) is not None:
                yield report
                if course.is_stopping:
                    raise KeyboardInterrupt
        finally:
            course.end()


class Course:
    """What surrounds the steps of one run."""

    def __init__(
        self, config: RunConfig, prepared: Prepared, trainer: Trainer, keeper: Keeper, log: RunLog | SilentLog
    ) -> None:
        self.is_stopping = False
        """A signal asked for it, and the step is kept."""
        self._stop = StopRequest()
        self._config, self._prepared, self._trainer = config, prepared, trainer
        self._keeper, self._log = keeper, log
        self._is_main = prepared.run.accelerator.is_main_process
        self._is_whole, self._has_diverged = True, False  # whole: no step is half done
        self._last: StepReport | None = None

    def begin(self, resumed: Resumed) -> None:
        """Measure where the run starts and open the progress bar."""
        log, run, fitted = self._log, self._prepared.run, self._prepared.fitted
        self._before, self._started = resumed, time.monotonic()
        self._held_out_before = resumed.held_out_loss_before
        log.summarise(**self._prepared.facts(), resumed=resumed.history)
        if self._prepared.held_out and not resumed.step:
            self._held_out_before = self._prepared.measure()
            log.add({"step": 0, "held_out_loss": self._held_out_before})
        log.summarise(held_out_loss_before=self._held_out_before, recompute=str(fitted.plan))
        forget_peak_memory()
        steps = self._trainer.steps()
        self._bar = progress_bar(steps, "train", run.steps, shown=self._is_main, done=resumed.step)
        self._steps = iter(self._bar)

    def advance(self) -> StepReport | None:
        """Take one step, with all that belongs to it; None at the end.

        Raises:
            UserError: The loss diverged, or no step fits the GPU.
        """
        if self._is_time_over():
            return None
        with self._stop.listening():
            self._is_whole = False
            try:
                report = next(self._steps, None)
            except DivergenceError as error:
                self._has_diverged = True
                raise DivergenceError(f"{error}; {self._way_back()}") from error
            except MemoryFullError as error:
                self._is_whole = True  # nothing of the step was applied
                raise MemoryFullError(f"{error}; {self._way_back()}{self._advice()}") from error
            self._is_whole = True
            if report is not None:
                report = self._watch(report)
                self.is_stopping = self._any(self._stop.came)
                if self.is_stopping or self._keeper.is_due(self._trainer):
                    self._keep()
                self._show(report)
        return report

    def end(self) -> None:
        """Keep what was learned, however the run ends."""
        self._bar.close()
        trainer, log = self._trainer, self._log
        if not self._is_main or not trainer.step or self._has_diverged:
            return
        if self._is_whole and self._keeper.saved_step != trainer.step:
            self._keep()
        with trainer.averaged():
            unet = self._prepared.run.accelerator.unwrap_model(self._prepared.run.unet)
            weights = lora.save_lora(unet, self._config.paths.output_dir)
        self._summarise()
        log.summarise(weights=str(weights))
        self._keeper.finish(weights)

    def _watch(self, report: StepReport) -> StepReport:
        prepared, measured_gib, held_out_loss = self._prepared, report.peak_memory_gib, None
        fitted, run, log = prepared.fitted, prepared.run, self._log
        first = self._before.step
        if report.step == first + FULL_STEP and measured_gib and (changed := fitted.correct(measured_gib)):
            LOGGER.warning("step %d: %s", report.step, changed)
            forget_peak_memory()
        if prepared.held_out and (report.step % run.config.validation_steps == 0 or report.step == run.steps):
            with self._trainer.averaged():
                held_out_loss = prepared.measure()
            log.summarise(held_out_loss=held_out_loss)
        report = replace(report, held_out_loss=held_out_loss)
        log.add(asdict(report) | {"forecast_memory_gib": fitted.forecast_gib})
        self._last = report
        return report

    def _keep(self) -> None:
        if self._is_main:
            about = {
                "seconds": round(self._seconds(), 1),
                "history": self._before.history,
                "held_out_loss_before": self._held_out_before,
            }
            self._keeper.save(self._trainer, about, self._log.metrics())
            self._summarise()

    def _summarise(self) -> None:
        fitted, last = self._prepared.fitted, self._last
        facts: dict[str, Any] = {"steps": self._trainer.step, "seconds": round(self._seconds(), 1)}
        facts |= {"recompute": str(fitted.plan), "forecast_memory_gib": fitted.forecast_gib}
        if last is not None:
            facts |= {"loss": last.loss, "peak_memory_gib": last.peak_memory_gib}
        self._log.summarise(**facts, checkpoint_step=self._keeper.saved_step)

    def _seconds(self) -> float:
        """Spent on training in all, before as well."""
        return self._before.seconds + time.monotonic() - self._started

    def _is_time_over(self) -> bool:
        limit, trainer = self._config.checkpoint.max_train_minutes, self._trainer
        over = limit is not None and time.monotonic() - self._prepared.started >= 60 * limit
        over = over and trainer.step > self._before.step  # else a short limit would never get anywhere
        if trainer.step == trainer.run.steps or not self._any(over):
            return False
        self._log.is_paused = True
        LOGGER.warning(
            "max_train_minutes=%g are over at step %d of %d; run the same command again to go on",
            *(limit, trainer.step, trainer.run.steps),
        )
        return True

    def _any(self, flag: bool) -> bool:
        """Whether it is so in any process, so that all do the same."""
        accelerator = self._prepared.run.accelerator
        if accelerator.num_processes == 1:
            return flag
        return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)

    def _way_back(self) -> str:
        step = self._keeper.saved_step
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is of step {step}"

    def _advice(self) -> str:
        """The settings that would help most, with what each is forecast to save."""
        found = self._prepared.fitted.forecast
        helps = what_helps(self._config, found)[:HELPS] if found else []
        return "".join(["\nby forecast, a step takes", *(f"\n  with {help}" for help in helps)]) if helps else ""

    def _show(self, report: StepReport) -> None:
        fitted, parts = self._prepared.fitted, [f"loss {report.loss:.4f}", f"{report.step_seconds:.2f} s/step"]
        if report.data_seconds >= 0.1 * report.step_seconds:
            parts.append(f"of it {report.data_seconds:.2f} s data")
        if report.peak_memory_gib:
            expected = f" ({fitted.forecast_gib:.1f} expected)" if fitted.forecast_gib else ""
            parts.append(f"{report.peak_memory_gib:.1f} GiB{expected}")
        if self._keeper.mirrored_step is not None:
            parts.append(f"safe in the mirror: step {self._keeper.mirrored_step}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)


def _keeper(config: RunConfig, prepared: Prepared, trainer: Trainer) -> Keeper:
    run, paths, settings = prepared.run, config.paths, config.checkpoint
    facts = prepared.identity | {
        "precision": prepared.precision.name,
        "optimizer": trainer.optimizer_name,
        "processes": run.accelerator.num_processes,
        "steps": run.steps,
        "device": run.accelerator.device.type,
        "versions": versions(("torch", "diffusers", "transformers", "peft", "bitsandbytes")),
    }
    mirror = None
    if settings.mirror_dir and run.accelerator.is_main_process:
        mirror = Mirror(settings.mirror_dir, paths.output_dir, run.examples.cache.folder)
        mirror.offer_cache()
    return Keeper(settings, paths.output_dir, fingerprint(config, facts), mirror)
