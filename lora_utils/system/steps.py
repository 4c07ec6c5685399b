"""Work that tells what it has as soon as it has it: generators, and what they return in the end."""

from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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
