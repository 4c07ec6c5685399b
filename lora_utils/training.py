"""The training loop: precomputed examples in, a better adapter out."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_utils import UserError, diffusion
from lora_utils.denoising import Batch, collate, training_losses, visit
from lora_utils.ema import WeightAverage
from lora_utils.memory import free_memory, peak_memory_gib
from lora_utils.optimizers import averaged_weights, new_lr_scheduler, new_optimizer
from lora_utils.schema import TrainConfig
from lora_utils.sdxl import NoiseSchedule
from lora_utils.visits import CachedExamples, Record, micro_batches

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What one optimiser update has to say. Equal runs give equal reports: times and memory are not compared."""

    step: int
    loss: float
    """Mean over the step's examples, weighted as the objective says."""
    learning_rate: float
    grad_norm: float | None
    """Before clipping; None where fp16 gradients overflowed, so that the step was skipped and the loss scale halved."""
    held_out_loss: float | None = None
    """Unweighted, on fixed noise and timesteps; at step 0 and every validation_steps."""
    step_seconds: float = field(default=0.0, compare=False)
    data_seconds: float = field(default=0.0, compare=False)
    """Of step_seconds, what was spent on reading and joining examples."""
    peak_memory_gib: float | None = field(default=None, compare=False)


class DivergenceError(UserError):
    """The loss is no longer finite."""


class MemoryFullError(UserError):
    """A step does not fit the GPU, however much is recomputed."""


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the loop works on."""

    unet: UNet2DConditionModel
    """With adapter, trainable parameters fp32, prepared by the accelerator."""
    dtype: torch.dtype
    """What the U-Net computes in; fp16 gets a scaled loss."""
    examples: CachedExamples
    """What is learned from."""
    unconditional: Record
    """prompt_embeds and pooled_prompt_embeds of no caption."""
    caption_dropout_rate: float
    """Share of visits that see no caption."""
    latent_mode: Literal["sample", "mean"]
    """Fresh latents on every visit, or the posterior's mean."""
    schedule: NoiseSchedule
    """Of the base model, as training uses it."""
    config: TrainConfig
    accelerator: Accelerator
    """Device and processes; precision and accumulation are the loop's."""
    make_room: Callable[[], str | None] = lambda: None
    """Called when a step did not fit: recomputes more and says what, or None when nothing is left to recompute."""

    @property
    def steps(self) -> int:
        """Optimiser updates in all."""
        visits = sum(entry.repeats for entry in self.examples.entries)
        return self.config.total_steps(visits, self.accelerator.num_processes)

    def autocast(self) -> AbstractContextManager[object]:
        """What forward passes run in: nothing where the lean step fits all dtypes by itself."""
        if self.config.lean_step or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, self.dtype)


class Trainer:
    """The loop and what it updates.

    Everything random is a function of the seed and of the count of visits, so equal seeds give equal runs however
    visits are cut into micro-batches.
    """

    def __init__(self, run: TrainingRun) -> None:
        """Make optimiser, schedule, loss scaler and average afresh."""
        self.run = run
        unet = run.accelerator.unwrap_model(run.unet)
        self._parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self._optimizer = new_optimizer(unet, run.config)
        self._lr_scheduler = new_lr_scheduler(self._optimizer, run.config, run.steps)
        self._scaler = torch.amp.GradScaler(run.accelerator.device.type, enabled=run.dtype == torch.float16)
        self._average = WeightAverage(unet, run.config.ema_decay) if run.config.use_ema else None

    def averaged(self) -> AbstractContextManager[None]:
        """The weights that are saved and measured, for as long as it is entered."""
        return averaged_weights(self._optimizer, self._average)

    def steps(self) -> Iterator[StepReport]:
        """Update the adapter, yielding a report after each step. A generator: the caller plots, saves or stops.

        Raises:
            DivergenceError: The loss became NaN or infinite.
            MemoryFullError: A step does not fit the GPU.
        """
        config = self.run.config
        size = config.train_batch_size * self.run.accelerator.num_processes
        order = micro_batches(self.run.examples.entries, size, config.seed)
        for step in range(1, self.run.steps + 1):
            started, learning_rate = time.monotonic(), float(self._lr_scheduler.get_last_lr()[0])
            numbers = [next(order) for _ in range(config.gradient_accumulation_steps)]
            while (outcome := self._gradients(step, numbers)) is None:
                self._make_room(step)
            losses, data_seconds = outcome
            grad_norm = self._update(step)
            loss = float(self.run.accelerator.reduce(torch.stack(losses).mean(), "mean"))
            if not math.isfinite(loss):
                raise DivergenceError(f"step {step}: the loss is {loss}; try a lower learning_rate")
            seconds = time.monotonic() - started
            yield StepReport(step, loss, learning_rate, grad_norm, None, seconds, data_seconds, peak_memory_gib())

    def _gradients(self, step: int, numbers: list[list[int]]) -> tuple[list[Tensor], float] | None:
        """Add up the gradients of a step: the micro-batches' losses and the seconds their data took; None if full."""
        run, losses, data_seconds = self.run, [], 0.0
        try:
            for place, examples in enumerate(numbers):
                waits = run.accelerator.no_sync(run.unet) if place < len(numbers) - 1 else nullcontext()
                first = ((step - 1) * len(numbers) + place) * len(examples)
                started = time.monotonic()
                batch = _batch(run, first, examples)
                data_seconds += time.monotonic() - started
                with waits:
                    loss = _loss(run, batch, first)
                    self._scaler.scale(loss / len(numbers)).backward()
                losses.append(loss.detach())
        except torch.OutOfMemoryError:
            return None
        return losses, data_seconds

    def _make_room(self, step: int) -> None:
        self._optimizer.zero_grad()
        free_memory()
        done = self.run.make_room() if self.run.accelerator.num_processes == 1 else None
        if done is None:
            raise MemoryFullError(
                f"step {step} does not fit the GPU's memory, and no more may be recomputed; set base_precision=nf4, "
                "gradient_checkpointing=auto, or a lower resolution or train_batch_size (python -m lora_utils check "
                "says what each would save)"
            )
        LOGGER.warning("step %d did not fit the GPU's memory; %s, and the same batch is tried again", step, done)

    def _update(self, step: int) -> float | None:
        self._scaler.unscale_(self._optimizer)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.run.config.max_grad_norm))
        self._scaler.step(self._optimizer)  # not where a gradient is infinite
        self._scaler.update()
        self._optimizer.zero_grad()
        with warnings.catch_warnings():
            # A first step that was skipped looks to torch as if the order were wrong.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self._lr_scheduler.step()
        if self._average is not None:
            self._average.update(step)
        return grad_norm if math.isfinite(grad_norm) else None


def _batch(run: TrainingRun, first: int, numbers: list[int]) -> Batch:
    """Read and join the share of this process in a micro-batch whose first visit has the given number."""
    size = run.config.train_batch_size
    mine = run.accelerator.process_index * size
    visits = [_visit_number(run, first + place, numbers[place]) for place in range(mine, mine + size)]
    return collate(visits).to(run.accelerator.device)


def _loss(run: TrainingRun, batch: Batch, first: int) -> Tensor:
    devices = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
    mine = run.accelerator.process_index * run.config.train_batch_size
    with torch.random.fork_rng(devices), run.autocast():
        seed = diffusion.derived_seed(run.config.seed, first + mine, 1)
        torch.manual_seed(seed)  # LoRA dropout draws from global state
        return training_losses(run.unet, batch, run.schedule, run.config).mean()


def _visit_number(run: TrainingRun, visit_number: int, example_number: int) -> Batch:
    generator = diffusion.visit_generator(run.config.seed, visit_number)
    dropped = torch.rand((), generator=generator) < run.caption_dropout_rate
    example = run.examples.draw(example_number, generator)
    if dropped:
        example = example | run.unconditional
    return visit(example, generator, run.schedule, latent_mode=run.latent_mode, config=run.config)
