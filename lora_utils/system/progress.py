"""Progress that reads well in a terminal, in a notebook and in a log file: bars, and results line by line."""

import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

from tqdm import tqdm

from lora_utils.system.console import is_terminal

Item = TypeVar("Item")
Result = TypeVar("Result")
LOG_INTERVAL_SECONDS = 10.0


def progress_bar(
    items: Iterable[Item], title: str, total: int | None = None, shown: bool = True, done: int = 0
) -> "tqdm[Item]":
    """A bar on standard output; where that is no terminal it moves every ten seconds: logs stay short.

    Not tqdm.auto: its widget stays at 0 % in a notebook that runs headless.

    Args:
        items: What to go through.
        title: In front of the bar.
        total: How many there are in all.
        shown: False shows nothing.
        done: How many of them lie behind already.
    """
    # A log file keeps every line that a terminal would overwrite.
    interval = 0.2 if is_terminal(sys.stdout) else LOG_INTERVAL_SECONDS
    return tqdm(
        items,
        title,
        total,
        initial=done,
        file=sys.stdout,
        mininterval=interval,
        maxinterval=interval,
        disable=not shown or sys.stdout is None,  # None: a service, or a descriptor that is closed
        ncols=110,
    )


class Steps(Generic[Item, Result]):
    """What a generator yields, one after the other, and then what it returns, as ``result``."""

    result: Result

    def __init__(self, steps: Generator[Item, None, Result]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[Item]:
        self.result = yield from self._steps


def finished(steps: Generator[Item, None, Result]) -> Result:
    """What a generator returns, for who does not want to hear of it before."""
    whole = Steps(steps)
    for _ in whole:
        pass
    return whole.result
