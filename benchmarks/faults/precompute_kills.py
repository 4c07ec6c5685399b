"""Runs precompute in children that are killed at random moments, until one gets through; counts the kills."""

import os
import random
import signal
import time

import torch

from lora_utils import stages


def precompute_under_kills(config, generator: random.Random, longest_seconds: float) -> int:
    """Start precompute again and again, as a user would with the same command; returns how often it was killed."""
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            _work(config)
        deadline = time.monotonic() + generator.uniform(0, longest_seconds)
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0, "precompute failed by itself"
                return kills
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1


def contents(found) -> dict:
    """Every tensor of the current examples, by key."""
    keys = [key for entry in found.entries for key in (*entry.image_keys, *entry.text_keys)]
    return {key: found.cache.read(key) for key in [*keys, found.unconditional_key]}


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
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        torch.set_num_threads(1)
        stages.precompute(config)
        code = 0
    finally:
        os._exit(code)
