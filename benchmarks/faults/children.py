"""Processes that work quietly and may be killed."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from benchmarks.faults.operations import silence


def are_forked() -> bool:
    """Whether children share what is imported here: CUDA would not survive it, so with a card not."""
    return not torch.cuda.is_available()


def start(work: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Do some work in a child; its exit code is 0 where that went well.

    Args:
        work: A function of a module, and with it all arguments, must be pickled for a fresh process.
        arguments: Of the work.
    """
    context: Any = multiprocessing.get_context("fork" if are_forked() else "spawn")
    child = context.Process(target=_quietly, args=(work, *arguments))
    child.start()
    return child


def succeeds(work: Callable[..., object], *arguments: Any) -> bool:
    """Whether some work in a child ends well."""
    child = start(work, *arguments)
    child.join()
    return child.exitcode == 0


def kill(child: BaseProcess) -> None:
    """No handler, no finally, as when a machine is taken away."""
    child.kill()
    child.join()


def _quietly(work: Callable[..., object], *arguments: Any) -> None:
    silence()
    torch.set_num_threads(1)
    work(*arguments)
