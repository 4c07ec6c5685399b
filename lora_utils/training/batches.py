"""Which examples a run visits, in which order, and which of their variants each visit sees.

All of it is a function of the seed and of the count of visits; nothing depends on how far a run came before.
"""

from collections.abc import Iterator, Sequence

import torch

from lora_utils.precompute.examples import Entry
from lora_utils.training import seeds
from lora_utils.training.objective import Batch, collate, draw_visit
from lora_utils.training.run import TrainingRun
from lora_utils.training.seeds import data_order


def micro_batches(entries: Sequence[Entry], size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of the examples of one micro-batch after the other, without end.

    An epoch shows every example ``repeats`` times in a fresh order. Each example waits until enough of its shape have
    come together, if need be into the next epoch: a batch never mixes shapes, is always full, and nothing is left out.
    With one shape this is the plain shuffled order cut into batches.

    Args:
        entries: The examples.
        size: Examples in a micro-batch, over all processes.
        seed: Of the run.
    """
    shapes = [entry.size for entry in entries]
    numbers = [number for number, entry in enumerate(entries) for _ in range(entry.repeats)]
    waiting: dict[tuple[int, int], list[int]] = {}
    epoch = 0
    while True:
        for place in data_order(seed, epoch, len(numbers)):
            number = numbers[place]
            batch = waiting.setdefault(shapes[number], [])
            batch.append(number)
            if len(batch) == size:
                del waiting[shapes[number]]
                yield batch
        epoch += 1


def read_batch(run: TrainingRun, first: int, numbers: list[int]) -> Batch:
    """Read and join the share of this process in a micro-batch whose first visit has the given number."""
    size = run.config.train_batch_size
    mine = run.accelerator.process_index * size
    visits = [draw_visit_number(run, first + place, numbers[place]) for place in range(mine, mine + size)]
    return collate(visits).to(run.accelerator.device)


def draw_visit_number(run: TrainingRun, visit_number: int, example_number: int) -> Batch:
    generator = seeds.visit_generator(run.config.seed, visit_number)
    dropped = torch.rand((), generator=generator) < run.caption_dropout_rate
    example = run.examples.draw(example_number, generator)
    if dropped:
        example = example | run.unconditional
    return draw_visit(example, generator, run.schedule, latent_mode=run.latent_mode, config=run.config)
