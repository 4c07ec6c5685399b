"""A model of CUDA's caching allocator: how much it takes from the card for what tensors ask of it.

Best fit in two pools, blocks split and merged within their segment, and segments without tensors given back when the
card is full, as torch's c10/cuda/CUDACachingAllocator.cpp does by default; ``expandable_segments`` need less.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
SMALL_BYTES, LARGE_BYTES, STEP_BYTES = MIB, 10 * MIB, 2 * MIB
SMALL_SEGMENT_BYTES, LARGE_SEGMENT_BYTES = 2 * MIB, 20 * MIB
PRECISION_BYTES = 8 * MIB
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
    low, high = live_bytes, reserved_bytes
    while high - low > PRECISION_BYTES:
        middle = (low + high) // 2
        if _run(trace, middle) is None:
            low = middle
        else:
            high = middle
    return high


def _run(trace: Trace, limit_bytes: float) -> int | None:
    """As ``replay``; None when more than the limit is needed."""
    pools = _Pool(is_small=True), _Pool(is_small=False)
    blocks: dict[int, _Block] = {}
    peak = 0
    for storage, size in trace:
        pool = pools[abs(size) > SMALL_BYTES]
        if size < 0:
            pool.give(blocks.pop(storage))
            continue
        block = pool.take(size)
        if block is None:
            segment = pool.segment(size)
            if sum(one.reserved for one in pools) + segment > limit_bytes:
                for one in pools:
                    one.release()
                if sum(one.reserved for one in pools) + segment > limit_bytes:
                    return None
            block = pool.take_new(size, segment)
            peak = max(peak, sum(one.reserved for one in pools))
        blocks[storage] = block
    return peak


@dataclass(eq=False)
class _Block:
    size: int
    serial: int
    before: "_Block | None" = None
    after: "_Block | None" = None
    free: bool = False


class _Pool:
    def __init__(self, is_small: bool) -> None:
        self.is_small, self.reserved, self._serial = is_small, 0, 0
        self._free: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}

    def segment(self, size: int) -> int:
        if self.is_small:
            return SMALL_SEGMENT_BYTES
        return LARGE_SEGMENT_BYTES if size < LARGE_BYTES else -(-size // STEP_BYTES) * STEP_BYTES

    def take(self, size: int) -> _Block | None:
        place = bisect_left(self._free, (size, -1))
        if place == len(self._free):
            return None
        block = self._blocks.pop(self._free.pop(place)[1])
        block.free = False
        return self._split(block, size)

    def take_new(self, size: int, segment: int) -> _Block:
        self.reserved += segment
        return self._split(self._new(segment), size)

    def give(self, block: _Block) -> None:
        for neighbour in (block.before, block.after):
            if neighbour and neighbour.free:
                self._forget(neighbour)
                block.size += neighbour.size
                if neighbour is block.before:
                    block.before = neighbour.before
                else:
                    block.after = neighbour.after
        if block.before:
            block.before.after = block
        if block.after:
            block.after.before = block
        self._add(block)

    def release(self) -> None:
        for block in list(self._blocks.values()):
            if block.before is None and block.after is None:
                self._forget(block)
                self.reserved -= block.size

    def _split(self, block: _Block, size: int) -> _Block:
        rest = block.size - size
        if rest > SMALL_BYTES or (self.is_small and rest):
            block.size, follower = size, self._new(rest)
            follower.before, follower.after, block.after = block, block.after, follower
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
