"""A model of CUDA's caching allocator: how much it takes from the card for what tensors ask of it.

Best fit in two pools, blocks split and merged within their segment, and segments without tensors given back
when the card is full, as torch's c10/cuda/CUDACachingAllocator.cpp does by default; ``expandable_segments``
need less. A *segment* is what CUDA gave, a *block* a stretch of one that holds one storage or is free.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
SMALL_BYTES = MIB  # storages up to this share the small pool
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_BYTES = 10 * MIB  # storages from this on get a segment of their own size
LARGE_SEGMENT_BYTES = 20 * MIB  # of those between the two
ROUND_BYTES = 2 * MIB  # segments of their own size are multiples of this
PRECISION_BYTES = 8 * MIB  # of ``least_limit``
Trace = Sequence[tuple[int, int]]


def replay(trace: Trace) -> int:
    """Most bytes reserved at a time, on a card that is large enough.

    Args:
        trace: Storage and its bytes in multiples of 512, negative when it is freed.
    """
    peak = _run(trace, math.inf)
    assert peak is not None
    return peak


def least_limit(trace: Trace, live_bytes: int, reserved_bytes: int) -> int:
    """The smallest limit that a trace stays within, to 8 MiB.

    Args:
        trace: As for ``replay``.
        live_bytes: Most that is alive at a time: no limit can be lower.
        reserved_bytes: What is reserved without a limit.
    """
    low = live_bytes
    high = reserved_bytes
    while high - low > PRECISION_BYTES:
        middle = (low + high) // 2
        if _run(trace, middle) is None:
            low = middle
        else:
            high = middle
    return high


def _run(trace: Trace, limit_bytes: float) -> int | None:
    """As ``replay``; None when more than the limit is needed."""
    small = _Pool(is_small=True)
    large = _Pool(is_small=False)
    blocks: dict[int, _Block] = {}
    peak = 0
    for storage, size in trace:
        pool = large if abs(size) > SMALL_BYTES else small
        if size < 0:
            pool.give(blocks.pop(storage))
            continue

        block = pool.take(size)
        if block is None:
            segment = pool.segment_bytes(size)
            if small.reserved + large.reserved + segment > limit_bytes:
                # A full card: torch gives all empty segments back, of both pools, and tries once more.
                small.release()
                large.release()
                if small.reserved + large.reserved + segment > limit_bytes:
                    return None
            block = pool.take_new(size, segment)
            peak = max(peak, small.reserved + large.reserved)
        blocks[storage] = block
    return peak


@dataclass(eq=False)
class _Block:
    """A stretch of a segment, linked to its neighbours there."""

    size: int
    serial: int
    before: "_Block | None" = None
    after: "_Block | None" = None
    free: bool = False


class _Pool:
    """Segments for storages of one kind, and their free blocks."""

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.reserved = 0
        self._serial = 0
        self._free: list[tuple[int, int]] = []  # size and serial number, sorted: best fit is a bisection
        self._blocks: dict[int, _Block] = {}  # the free ones, by serial number

    def segment_bytes(self, size: int) -> int:
        """What is asked of CUDA for a storage of this size."""
        if self.is_small:
            return SMALL_SEGMENT_BYTES
        if size < LARGE_BYTES:
            return LARGE_SEGMENT_BYTES
        return -(-size // ROUND_BYTES) * ROUND_BYTES

    def take(self, size: int) -> _Block | None:
        """The smallest free block that is large enough, split if it is larger; None where there is none."""
        index = bisect_left(self._free, (size, -1))
        if index == len(self._free):
            return None
        _, serial = self._free.pop(index)
        block = self._blocks.pop(serial)
        block.free = False
        return self._split(block, size)

    def take_new(self, size: int, segment: int) -> _Block:
        """A block of a new segment."""
        self.reserved += segment
        return self._split(self._new(segment), size)

    def give(self, block: _Block) -> None:
        """Free a block, and merge it with what is free beside it."""
        for neighbour in (block.before, block.after):
            if neighbour and neighbour.free:
                self._forget(neighbour)
                block.size += neighbour.size
                if neighbour is block.before:
                    block.before = neighbour.before
                else:
                    block.after = neighbour.after
        # Only now the neighbours' own links: after both merges, whoever they are.
        if block.before:
            block.before.after = block
        if block.after:
            block.after.before = block
        self._add(block)

    def release(self) -> None:
        """Give back the segments that are one free block."""
        for block in list(self._blocks.values()):
            if block.before is None and block.after is None:
                self._forget(block)
                self.reserved -= block.size

    def _split(self, block: _Block, size: int) -> _Block:
        """Leave the rest free, where it is worth a block: in the large pool only what is above 1 MiB."""
        rest = block.size - size
        if rest > SMALL_BYTES or (self.is_small and rest):
            block.size = size
            follower = self._new(rest)
            follower.before = block
            follower.after = block.after
            block.after = follower
            if follower.after:
                follower.after.before = follower
            self._add(follower)
        return block

    def _new(self, size: int) -> _Block:
        self._serial += 1
        return _Block(size, self._serial)

    def _add(self, block: _Block) -> None:
        block.free = True
        self._blocks[block.serial] = block
        insort(self._free, (block.size, block.serial))

    def _forget(self, block: _Block) -> None:
        self._free.pop(bisect_left(self._free, (block.size, block.serial)))
        del self._blocks[block.serial]
