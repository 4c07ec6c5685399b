"""The held-out loss: a figure that moves only when the model does."""

import torch
from diffusers import UNet2DConditionModel

from lora_utils.model.base import NoiseSchedule
from lora_utils.precompute.examples import CachedExamples, Record
from lora_utils.training.objective import Batch, collate, denoising_errors, draw_visit
from lora_utils.training.seeds import visit_generator

TIMESTEPS_PER_EXAMPLE = 8
SEED = 0  # not the run's: figures of runs with other seeds stay comparable


class HeldOutLoss:
    """Mean squared error on examples kept out of training, over fixed noise and stratified timesteps.

    Each example is seen at eight timesteps, one from each eighth of the schedule; the examples' timesteps
    interleave, so together they cover the schedule evenly.
    """

    def __init__(self, examples: CachedExamples, schedule: NoiseSchedule) -> None:
        """Draw noise and timesteps once: the figure then differs between two models alone.

        Args:
            examples: What was kept out of training; all of it is held in memory.
            schedule: From ``training_schedule``.
        """
        self._schedule = schedule
        count = len(examples)
        self._batches = [self._fixed_batch(examples.read(index), index, count) for index in range(count)]

    def __len__(self) -> int:
        """How many examples are held out."""
        return len(self._batches)

    @torch.no_grad()
    def measure(self, unet: UNet2DConditionModel, device: torch.device) -> float:
        """The loss of the U-Net as it is now; its training mode is left as it was."""
        was_training = unet.training
        # LoRA dropout would make the figure jump.
        unet.eval()
        errors = [denoising_errors(unet, batch.to(device), self._schedule).mean() for batch in self._batches]
        unet.train(was_training)
        return torch.stack(errors).mean().item()

    def _fixed_batch(self, example: Record, index: int, count: int) -> Batch:
        """One example at eight timesteps; the index shifts them within their strata."""
        length = len(self._schedule.alphas_cumprod)
        generator = visit_generator(SEED, index)
        visits = []
        for stratum in range(TIMESTEPS_PER_EXAMPLE):
            position = (stratum + (index + 0.5) / count) / TIMESTEPS_PER_EXAMPLE  # in (0, 1)
            visits.append(draw_visit(example, generator, self._schedule, int(position * length)))
        return collate(visits)
