"""When a run ends before its last step: a signal, or its time is over. All processes decide alike."""

import logging
import time
from contextlib import AbstractContextManager

import torch

from lora_utils.system.signals import StopRequest
from lora_utils.training.run import TrainingRun
from lora_utils.training.state import TrainingState

LOGGER = logging.getLogger(__name__)


class Stopping:
    """Asked by the loop once a step."""

    def __init__(self, run: TrainingRun, state: TrainingState, max_train_minutes: float | None) -> None:
        """Remember where the run starts.

        Args:
            run: When it began, and its processes.
            state: At the step that the run goes on from.
            max_train_minutes: From the beginning of the stage, encoding and loading included; None for no
                limit.
        """
        self._run = run
        self._state = state
        self._first_step = state.step
        self._max_train_minutes = max_train_minutes
        self._request = StopRequest()

    def listening(self) -> AbstractContextManager[None]:
        """While it is entered, a first signal is noted instead of stopping at once."""
        return self._request.listening()

    def is_told_to_stop(self) -> bool:
        """Whether a signal has come in any process."""
        return self._in_any_process(self._request.came)

    def is_time_over(self) -> bool:
        """Whether max_train_minutes are over, which is then told.

        A run always takes one step more: else a limit below the time for loading would never get anywhere.
        """
        limit = self._max_train_minutes
        # Asked before a step, not after: a step that was begun is always finished and kept.
        is_over = limit is not None and time.monotonic() - self._run.started >= 60 * limit
        if not self._in_any_process(is_over and self._state.step > self._first_step):
            return False
        LOGGER.warning(
            "max_train_minutes=%g are over at step %d of %d; run the same command again to go on",
            *(limit, self._state.step, self._state.steps),
        )
        return True

    def _in_any_process(self, flag: bool) -> bool:
        """Whether it is so anywhere: a process that stopped alone would leave the others waiting for ever."""
        accelerator = self._run.accelerator
        if accelerator.num_processes == 1:
            return flag
        # A sum, since any one of them is enough.
        count = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
        return bool(count > 0)
