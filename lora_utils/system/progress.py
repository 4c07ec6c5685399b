"""Progress bars that read well in a terminal, in a notebook and in a log file."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from lora_utils.system.console import is_terminal
from lora_utils.system.redaction import redacted

Item = TypeVar("Item")
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


def announce(line: str) -> None:
    """Say on standard output, above the bar of what follows, what will be done."""
    if sys.stdout is not None:
        print(redacted(line), flush=True)
