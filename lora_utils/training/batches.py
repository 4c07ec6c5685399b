"""Which examples a run visits, in which order, and which of their variants each visit sees.

A *visit* is one look at one example; visits are counted through the run. All of it is a function of the seed
and of that count; nothing depends on how far a run came before.
"""

from collections.abc import Iterator, Sequence

import torch

from lora_utils.precompute.examples import Entry
from lora_utils.training.objective import Batch, collate, draw_visit
from lora_utils.training.run import TrainingRun
from lora_utils.training.seeds import data_order, visit_generator


def micro_batches(entries: Sequence[Entry], size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of the examples of one micro-batch after the other, without end.

    An epoch shows every example ``repeats`` times in a fresh order. Each example waits until enough of its
    shape have come together, if need be into the next epoch: a batch never mixes shapes, is always full, and
    nothing is left out. With one shape this is the plain shuffled order cut into batches.

    Args:
        entries: The examples.
        size: Examples in a micro-batch, over all processes.
        seed: The run's seed.
    """
    shapes = [entry.size for entry in entries]
    numbers = [number for number, entry in enumerate(entries) for _ in range(entry.repeats)]
    waiting: dict[tuple[int, int], list[int]] = {}
    epoch = 0
    while True:
        for position in data_order(seed, epoch, len(numbers)):
            number = numbers[position]
            # A shape's examples wait for each other across the end of an epoch.
            batch = waiting.setdefault(shapes[number], [])
            batch.append(number)
            if len(batch) == size:
                del waiting[shapes[number]]
                yield batch
        epoch += 1


def read_batch(run: TrainingRun, first_visit: int, numbers: list[int]) -> Batch:
    """Read and join this process' share of a micro-batch.

    Args:
        run: Examples and seed.
        first_visit: The number of the micro-batch's first visit, over all processes.
        numbers: Of the micro-batch's examples, over all processes.

    Returns:
        train_batch_size examples of one shape, on the CPU.
    """
    size = run.config.train_batch_size
    # Processes share one micro-batch, in the order of their index: two with batch 1 see what one with batch 2
    # sees.
    start = run.accelerator.process_index * size
    visits = []
    for index in range(start, start + size):
        visits.append(draw_visit_number(run, first_visit + index, numbers[index]))
    return collate(visits)


def draw_visit_number(run: TrainingRun, visit_number: int, example_number: int) -> Batch:
    """The visit of this number to an example: a batch of one, on the CPU."""
    generator = visit_generator(run.config.seed, visit_number)
    # Drawn first and always: whether captions are dropped must not move the draws that come after.
    is_dropped = torch.rand((), generator=generator) < run.caption_dropout_rate
    example = run.examples.draw(example_number, generator)
    if is_dropped:
        example = example | run.unconditional
    return draw_visit(example, generator, run.schedule, latent_mode=run.latent_mode, config=run.config)
