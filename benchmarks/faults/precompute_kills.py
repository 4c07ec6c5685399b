"""Runs precompute in children that are killed at random moments, until one gets through; counts the kills."""

import os
import random
import signal
import time

import torch

from benchmarks.faults.operations import silence
from lora_utils import stages


def precompute_under_kills(config, generator: random.Random, longest_seconds: float) -> int:
    """Start precompute again and again, as a user would with the same command; how often it was killed."""
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            _work(config)

        deadline = time.monotonic() + generator.uniform(0, longest_seconds)
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert status == 0, "precompute failed by itself"
                return kills
            time.sleep(0.002)

        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
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


def _work(config) -> None:
    code = 1
    try:
        silence()
        torch.set_num_threads(1)
        stages.precompute(config)
        code = 0
    finally:
        os._exit(code)  # the child must never return into its parent's campaign
