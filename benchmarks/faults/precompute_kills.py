"""Runs precompute in children that are killed at random moments, until one gets through; counts the kills."""

import random

import torch

from benchmarks.faults import children
from lora_utils import stages


def precompute_under_kills(config, generator: random.Random, longest_seconds: float) -> int:
    """Start precompute again and again, as a user would with the same command; how often it was killed."""
    kills = 0
    while True:
        child = children.start(stages.precompute, config)
        child.join(generator.uniform(0, longest_seconds))
        if child.exitcode is not None:
            assert child.exitcode == 0, "precompute failed by itself"
            return kills
        children.kill(child)
        kills += 1


def contents(precomputed) -> dict:
    """Every tensor of the current examples, by key."""
    keys = [key for entry in precomputed.entries for key in (*entry.image_keys, *entry.text_keys)]
    return {key: precomputed.cache.read(key) for key in [*keys, precomputed.unconditional_key]}


def same(first: dict, second: dict) -> bool:
    """Equal keys, equal bits."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[key][name])
        for key, record in first.items()
        for name, tensor in record.items()
    )
