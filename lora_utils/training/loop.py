"""The training loop: precomputed examples in, a better adapter out."""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lora_utils import UserError
from lora_utils.ema import WeightAverage
from lora_utils.memory import free_memory, peak_memory_gib
from lora_utils.microbatches import TrainingRun, batch_loss, read_batch
from lora_utils.optimizers import averaged_weights, go_to_step, load_states, new_lr_scheduler, new_optimizer
from lora_utils.visits import micro_batches

LOGGER = logging.getLogger(__name__)
SHOWN = 8


@dataclass(frozen=True)
class StepReport:
    """What one optimiser update has to say. Equal runs give equal reports: times and memory are not compared."""

    step: int
    loss: float
    """Mean over the step's examples, weighted as the objective says; not finite where a forward pass overflowed."""
    learning_rate: float
    grad_norm: float | None
    """Before clipping; None where it was not finite: the step was skipped, and in fp16 the loss scale halved."""
    held_out_loss: float | None = None
    """Unweighted, on fixed noise and timesteps; at step 0 and every validation_steps."""
    step_seconds: float = field(default=0.0, compare=False)
    data_seconds: float = field(default=0.0, compare=False)
    """Of step_seconds, what was spent on reading and joining examples."""
    peak_memory_gib: float | None = field(default=None, compare=False)


class DivergenceError(UserError):
    """Loss or gradients were not finite for too many steps."""


class MemoryFullError(UserError):
    """A step does not fit the GPU, however much is recomputed."""


class Trainer:
    """The loop and what it updates.

    Everything random is a function of the seed and of the count of visits, so equal seeds give equal runs however
    visits are cut into micro-batches.
    """

    def __init__(self, run: TrainingRun) -> None:
        """Make optimiser, schedule, loss scaler and average afresh."""
        self.run = run
        unet = run.accelerator.unwrap_model(run.unet)
        self._adapter = {name: one for name, one in unet.named_parameters() if one.requires_grad}
        self._optimizer = new_optimizer(unet, run.config)
        self._lr_scheduler = new_lr_scheduler(self._optimizer, run.config, run.steps)
        self._scaler = torch.amp.GradScaler(run.accelerator.device.type, enabled=run.dtype == torch.float16)
        self._average = WeightAverage(unet, run.config.ema_decay) if run.config.use_ema else None
        self._skipped = 0
        self.step = 0

    @property
    def optimizer_name(self) -> str:
        """The class that is used, which may be another than was asked for."""
        return type(self._optimizer).__name__

    def averaged(self) -> AbstractContextManager[None]:
        """The weights that are saved and measured, for as long as it is entered."""
        return averaged_weights(self._optimizer, self._average)

    def steps(self) -> Iterator[StepReport]:
        """Update the adapter, yielding a report after each step. A generator: the caller plots, saves or stops.

        Goes on after ``step``. While it waits at a yield, ``state_dict`` is the state after that step.

        Raises:
            DivergenceError: Loss or gradients were not finite for ``max_skipped_steps`` in a row.
            MemoryFullError: A step does not fit the GPU.
        """
        config = self.run.config
        size = config.train_batch_size * self.run.accelerator.num_processes
        order = micro_batches(self.run.examples.entries, size, config.seed)
        order = islice(order, self.step * config.gradient_accumulation_steps, None)
        for step in range(self.step + 1, self.run.steps + 1):
            started, learning_rate = time.monotonic(), float(self._lr_scheduler.get_last_lr()[0])
            numbers = [next(order) for _ in range(config.gradient_accumulation_steps)]
            while (outcome := self._gradients(step, numbers)) is None:
                self._make_room(step)
            losses, data_seconds = outcome
            grad_norm = self._update(step)
            loss = float(self.run.accelerator.reduce(torch.stack(losses).mean(), "mean"))
            self._count_skipped(step, numbers, grad_norm)
            self.step = step
            seconds = time.monotonic() - started
            yield StepReport(step, loss, learning_rate, grad_norm, None, seconds, data_seconds, peak_memory_gib())

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on besides the settings: tensors as they are, not copies."""
        return {
            "step": self.step,
            "micro_batches": self.step * self.run.config.gradient_accumulation_steps,
            "skipped": self._skipped,
            "adapter": {name: parameter.detach() for name, parameter in self._adapter.items()},
            "average": self._average.state_dict() if self._average else {},
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], optimizer_too: bool = True) -> None:
        """Go on after the step of a state; rates and other settings of the optimiser stay those of this run.

        Args:
            state: From ``state_dict`` of a run with the same adapter.
            optimizer_too: Leave the optimiser's states fresh where those of the state are another class's.

        Raises:
            ValueError: The adapter has other layers or shapes; nothing was changed.
        """
        shapes = {name: tensor.shape for name, tensor in state["adapter"].items()}
        if shapes != {name: parameter.shape for name, parameter in self._adapter.items()}:
            raise ValueError("its adapter has other layers or another rank")
        with torch.no_grad():
            for name, parameter in self._adapter.items():
                parameter.copy_(state["adapter"][name])
        if optimizer_too:
            load_states(self._optimizer, state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"] or state["adapter"])
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self.step, self._skipped = state["step"], state["skipped"]
        go_to_step(self._lr_scheduler, self.step)

    def _gradients(self, step: int, numbers: list[list[int]]) -> tuple[list[Tensor], float] | None:
        """Add up the gradients of a step: the micro-batches' losses and the seconds their data took; None if full."""
        run, losses, data_seconds = self.run, [], 0.0
        try:
            for place, examples in enumerate(numbers):
                waits = run.accelerator.no_sync(run.unet) if place < len(numbers) - 1 else nullcontext()
                first = ((step - 1) * len(numbers) + place) * len(examples)
                started = time.monotonic()
                batch = read_batch(run, first, examples)
                data_seconds += time.monotonic() - started
                with waits:
                    loss = batch_loss(run, batch, first)
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
                "gradient_checkpointing=auto, or a lower resolution or train_batch_size"
            )
        LOGGER.warning("step %d did not fit the GPU's memory; %s, and the same batch is tried again", step, done)

    def _update(self, step: int) -> float | None:
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._adapter.values(), self.run.config.max_grad_norm)
        grad_norm = float(norm)
        if math.isfinite(grad_norm) or self._scaler.is_enabled():  # which leaves out such a step by itself
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        with warnings.catch_warnings():
            # A first step that was skipped looks to torch as if the order were wrong.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self._lr_scheduler.step()
        if self._average is not None:
            self._average.update(step)
        return grad_norm if math.isfinite(grad_norm) else None

    def _count_skipped(self, step: int, numbers: list[list[int]], grad_norm: float | None) -> None:
        self._skipped = 0 if grad_norm is not None else self._skipped + 1
        if not self._skipped:
            return
        run = self.run
        seen = sorted({run.examples.entries[number].source for batch in numbers for number in batch})
        shown = ", ".join(seen[:SHOWN]) + (f" and {len(seen) - SHOWN} more" if len(seen) > SHOWN else "")
        scale = f"loss scale {self._scaler.get_scale():g}, " if self._scaler.is_enabled() else ""
        where = f"{scale}learning rate {self._lr_scheduler.get_last_lr()[0]:g}, examples {shown}"
        if self._skipped >= run.config.max_skipped_steps:
            raise DivergenceError(
                f"step {step}: no finite loss and gradient for {self._skipped} steps, which were left out ({where}); "
                "try a lower learning_rate, or mixed_precision=fp32"
            )
        if not self._scaler.is_enabled():  # there an overflow now and then finds the right scale
            LOGGER.warning("step %d is left out: loss or gradient is not finite (%s)", step, where)
