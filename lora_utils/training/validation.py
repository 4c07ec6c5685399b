"""The held-out loss: a figure that moves only when the model does."""

import logging

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_utils.memory.step_shape import HELD_OUT_TIMESTEPS
from lora_utils.model.base import NoiseSchedule
from lora_utils.precompute.examples import CachedExamples, Record
from lora_utils.system.device_memory import free_memory, is_memory_full
from lora_utils.training.objective import Batch, collate, denoising_errors, draw_visit
from lora_utils.training.seeds import visit_generator

LOGGER = logging.getLogger(__name__)
SEED = 0  # not the run's: figures of runs with other seeds stay comparable


class HeldOutLoss:
    """Mean squared error on examples kept out of training, over fixed noise and stratified timesteps.

    Each example is seen at eight timesteps, one from each eighth of the schedule; the examples' timesteps
    interleave, so together they cover the schedule evenly.
    """

    def __init__(self, examples: CachedExamples, schedule: NoiseSchedule, batch_size: int) -> None:
        """Draw noise and timesteps once: the figure then differs between two models alone.

        Args:
            examples: What was kept out of training; all of it is held in memory.
            schedule: From ``training_schedule``.
            batch_size: So much goes through the U-Net at a time: what a training step takes fits the card.
        """
        self._schedule = schedule
        self._batch_size = batch_size
        count = len(examples)
        self._batches = [self._fixed_batch(examples.read(index), index, count) for index in range(count)]

    def __len__(self) -> int:
        """How many examples are held out."""
        return len(self._batches)

    @torch.no_grad()
    def measure(self, unet: UNet2DConditionModel, device: torch.device) -> float:
        """The loss of the U-Net as it is now; its training mode is left as it was.

        Where the card is full it goes on with half as many at a time.

        Raises:
            RuntimeError: Not even one fits.
        """
        was_training = unet.training
        # LoRA dropout would make the figure jump.
        unet.eval()
        try:
            errors = [self._errors(unet, batch, device) for batch in self._batches]
        finally:
            unet.train(was_training)
        return torch.cat(errors).mean().item()

    def _errors(self, unet: UNet2DConditionModel, batch: Batch, device: torch.device) -> Tensor:
        """Of each visit of a batch, (B,), fp32."""
        while True:
            try:
                pieces = (piece.to(device) for piece in batch.split(self._batch_size))
                return torch.cat([denoising_errors(unet, piece, self._schedule) for piece in pieces])
            except RuntimeError as error:
                if not is_memory_full(error) or self._batch_size == 1:
                    raise
            # Outside the handler, whose traceback holds the failed pass.
            self._batch_size //= 2
            free_memory()
            LOGGER.warning("the card was full: held-out loss is measured by %d at a time", self._batch_size)

    def _fixed_batch(self, example: Record, index: int, count: int) -> Batch:
        """One example at eight timesteps; the index shifts them within their strata."""
        length = len(self._schedule.alphas_cumprod)
        generator = visit_generator(SEED, index)
        visits = []
        for stratum in range(HELD_OUT_TIMESTEPS):
            position = (stratum + (index + 0.5) / count) / HELD_OUT_TIMESTEPS  # in (0, 1)
            visits.append(draw_visit(example, generator, self._schedule, int(position * length)))
        return collate(visits)
