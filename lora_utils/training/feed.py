"""The micro-batches of a run, each on its way to the device before it is asked for.

On a card a batch goes up as one pinned buffer, on a stream of its own: the host waits for nothing, and the
copy runs beside the step before. What a step is made of does not depend on any of this.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lora_utils import UserError
from lora_utils.training.batches import micro_batches, read_batch
from lora_utils.training.objective import Batch
from lora_utils.training.run import TrainingRun

ALIGNMENT = 16
"""Of each tensor in the buffer, in bytes: what the widest loads of a card want."""


@dataclass(frozen=True)
class MicroBatch:
    """Which visits one backward pass is made of, over all processes."""

    first_visit: int
    numbers: list[int]
    """Of the examples."""


class Feed:
    """Reads what the loop asks for, and meanwhile what it will ask for next."""

    def __init__(self, run: TrainingRun, steps_taken: int) -> None:
        """Stand before the first micro-batch that is left.

        Args:
            run: Examples, seed, device.
            steps_taken: Steps of the run that lie behind.
        """
        self._run = run
        self._per_step = run.config.gradient_accumulation_steps
        self._order = _micro_batches_from(run, steps_taken * self._per_step)
        self._seen: deque[MicroBatch] = deque()
        self._uploads: dict[int, Upload] = {}
        device = run.accelerator.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def step(self) -> list[MicroBatch]:
        """The micro-batches of the next step."""
        while len(self._seen) < self._per_step:
            self._seen.append(next(self._order))
        return [self._seen.popleft() for _ in range(self._per_step)]

    def read(self, micro_batch: MicroBatch) -> Batch:
        """A micro-batch's share of this process, on the run's device; as often as it is asked for.

        Raises:
            UserError: A record cannot be read.
        """
        upload = self._uploads.pop(micro_batch.first_visit, None) or self._start(micro_batch)
        return upload.arrived()

    def prepare(self, following: MicroBatch | None = None) -> None:
        """Start the upload of a micro-batch; of the next step's first one, when none is given.

        What cannot be read is told when it is asked for, and not before.
        """
        if self._stream is None:  # on a CPU nothing runs beside it
            return
        if following is None:
            if not self._seen:
                self._seen.extend(islice(self._order, 1))
            following = self._seen[0] if self._seen else None
        if following is None or following.first_visit in self._uploads:
            return
        try:
            self._uploads[following.first_visit] = self._start(following)
        except (UserError, OSError):
            return

    def _start(self, micro_batch: MicroBatch) -> "Upload":
        return Upload(read_batch(self._run, micro_batch.first_visit, micro_batch.numbers), self._stream)


class Upload:
    """A batch on its way; without a stream it stays where it is."""

    def __init__(self, batch: Batch, stream: torch.cuda.Stream | None) -> None:
        self._batch = batch
        self._stream = stream
        if stream is None:
            return
        self._pinned = _packed(batch)
        with torch.cuda.stream(stream):
            self._buffer = self._pinned.to(stream.device, non_blocking=True)
            self._copied = stream.record_event()

    def arrived(self) -> Batch:
        """The batch on the device; what is launched from now on waits for it, the host does not."""
        if self._stream is None:
            return self._batch
        current = torch.cuda.current_stream()
        current.wait_event(self._copied)
        # Else its memory could be given to another tensor of its own stream while this one still reads it.
        self._buffer.record_stream(current)
        return Batch(**_unpacked(self._buffer, vars(self._batch)))


def _micro_batches_from(run: TrainingRun, count: int) -> Iterator[MicroBatch]:
    """All that are left of the run, after the first so many."""
    size = run.config.train_batch_size * run.accelerator.num_processes
    order = micro_batches(run.examples.entries, size, run.config.seed)
    end = run.steps * run.config.gradient_accumulation_steps
    # The order cannot be entered in its middle: with several shapes, who waits for whom depends on the whole
    # past.
    for index, numbers in enumerate(islice(order, count, end), start=count):
        yield MicroBatch(index * size, numbers)


def _packed(batch: Batch) -> Tensor:
    """All tensors of a batch behind each other, uint8, in pinned memory."""
    tensors = vars(batch)
    size = sum(_aligned(tensor.nbytes) for tensor in tensors.values())
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for name, place in _unpacked(buffer, tensors).items():
        place.copy_(tensors[name])
    return buffer


def _unpacked(buffer: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of a buffer, with the shapes and dtypes of some tensors."""
    views = {}
    start = 0
    for name, tensor in like.items():
        part = buffer[start : start + tensor.nbytes]
        views[name] = part.view(tensor.dtype).view(tensor.shape)
        start += _aligned(tensor.nbytes)
    return views


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
