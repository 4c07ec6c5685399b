"""All randomness of a run, as functions of its seed and of counts: nothing has to be remembered to go on."""

import numpy as np
import torch


def visit_generator(seed: int, visit: int) -> torch.Generator:
    """The source of all randomness of one visit to one example: a CPU generator, equal on every machine.

    Visits are counted through the whole run, so a visit stands for a step, a place in its batch and, by
    ``data_order``, an example.
    """
    # seed + visit would make a run with seed 1 repeat the noise of a run with seed 0, one visit late; a hash
    # does not.
    return torch.Generator().manual_seed(derived_seed(seed, visit))


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on every one of the numbers (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def data_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which an epoch visits its examples: a permutation of 0 .. size - 1, (size,), int64."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(size)
