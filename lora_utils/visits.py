"""Which examples a run visits, in which order, and which of their variants each visit sees.

All of it is a function of the seed and of the count of visits; nothing depends on how far a run came before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_utils.cache import Cache
from lora_utils.diffusion import data_order
from lora_utils.index import Entry

Record = dict[str, Tensor]


@dataclass(frozen=True)
class CachedExamples:
    """Precomputed examples; their tensors are read when a visit asks for them."""

    cache: Cache
    entries: Sequence[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, number: int, image: int = 0, text: int = 0) -> Record:
        """One variant of an example: moments, time_ids, prompt_embeds, pooled_prompt_embeds, perhaps loss_mask."""
        entry = self.entries[number]
        return self.cache.read(entry.image_keys[image]) | self.cache.read(entry.text_keys[text])

    def draw(self, number: int, generator: torch.Generator) -> Record:
        """A variant of image and caption chosen by the generator, every one with equal chance."""
        entry = self.entries[number]
        image = _choose(len(entry.image_keys), generator)
        return self.read(number, image, _choose(len(entry.text_keys), generator))


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


def _choose(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator)) if count > 1 else 0
