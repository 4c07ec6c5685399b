"""torch.cuda.Stream and Event on the pretended card, where copies come when somebody waits for their stream.

An event waits for all of its stream, which is more than a card's does.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NUMBERS = itertools.count(1)
"""Of streams; 0 is the default one."""


class Stream(torch.Stream):
    """What torch.cuda.Stream does, by the compiled module."""

    def __new__(cls, device: Any = None, priority: int = 0, number: int | None = None) -> "Stream":
        return super().__new__(cls, device="cuda")

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
        self.cuda_stream = next(NUMBERS) if number is None else number

    def wait_stream(self, other: "Stream") -> None:
        _card().wait_for(other.cuda_stream)

    def wait_event(self, event: "Event") -> None:
        _card().wait_for(event.stream)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _wait(self.cuda_stream)

    def query(self) -> bool:
        _card().wait_for(self.cuda_stream)
        return True


class Event:
    """What torch.cuda.Event does."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.stream = 0
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = (stream or current_stream()).cuda_stream
        self.seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        _card().wait_for(self.stream)

    def synchronize(self) -> None:
        _wait(self.stream)

    def query(self) -> bool:
        _card().wait_for(self.stream)
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other.seconds - self.seconds)


def current_stream(device: Any = None) -> Stream:
    return Stream(number=_card().current_stream())


def default_stream(device: Any = None) -> Stream:
    return Stream(number=0)


def set_stream(stream: Stream) -> None:
    _card().set_stream(stream.cuda_stream)


@contextmanager
def entered(stream: Stream | None) -> Iterator[None]:
    """torch.cuda.stream."""
    before = current_stream()
    set_stream(stream or before)
    try:
        yield
    finally:
        set_stream(before)


def synchronize() -> None:
    card = _card()
    card.count(card.WAIT)
    card.wait_for_all()


def _wait(stream: int) -> None:
    card = _card()
    card.count(card.WAIT)
    card.wait_for(stream)


def _card() -> Any:
    return sys.modules["pretended"]
