"""Decodes and crops images in worker processes while the encoder works.

One process that decodes and encodes by turns would leave the GPU idle for as long as it decodes. Nothing here
imports torch: each spawned worker would load it, which takes seconds and hundreds of MiB.
"""

import logging
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.context import SpawnContext, SpawnProcess
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from lora_utils.config.data import DataConfig
from lora_utils.data.crops import Crop
from lora_utils.data.findings import Finding, refused
from lora_utils.data.images import ImageError, decode
from lora_utils.data.inspection import ALPHA, InspectedExample, read_unchanged

LOGGER = logging.getLogger(__name__)
NO_WORKERS = "worker processes cannot start here, so images are decoded in this one, which takes longer"
WORTH_WORKERS = 64
"""Images that outweigh the start of several workers."""
LARGE_PX = 12 * 10**6
"""Pixels of an image whose decoding, at 3 bytes each and in several copies, should not swell this process."""
AHEAD = 4
"""Jobs that are under way for each worker: enough to keep it busy, few enough to be held in memory."""


@dataclass(frozen=True)
class Job:
    """One image to decode, with everything that decides its pixels; travels to a worker process."""

    number: int
    """The caller's index of the example; comes back with the result."""
    source: str
    """What the user knows the image by."""
    content: bytes
    """The encoded image file."""
    crops: Mapping[str, Crop]
    """What to cut out of it, by the name of what it will be."""
    background: str
    """Colour behind transparent pixels."""
    mask: bytes | None = None
    """An encoded mask file."""
    alpha_mask: bool = False
    """Take the alpha channel as the mask."""
    mask_scale: int = 8
    """Pixels to a latent."""


@dataclass(frozen=True)
class Picture:
    """One crop of a decoded image."""

    key: str
    """Its name in the job."""
    crop: Crop
    pixels: np.ndarray
    """(height, width, 3), uint8."""
    mask: np.ndarray | None
    """(height, width) in latents, uint8; None without a mask."""
    findings: tuple[Finding, ...]
    """What was changed to make it usable."""


@dataclass(frozen=True)
class DecodedJob:
    """The pictures of one job, or why there are none."""

    number: int
    source: str
    pictures: tuple[Picture, ...] = ()
    refusal: Finding | None = None


def new_job(
    number: int,
    inspected: InspectedExample,
    crops: Mapping[str, Crop],
    config: DataConfig,
    mask_scale: int = 8,
) -> Job:
    """Read an image again, and say what is to be cut out of it.

    Args:
        number: The caller's index of the example; comes back in the result.
        inspected: What the file must still be.
        crops: By the names that their pictures will carry.
        config: Says which colour lies behind transparent pixels.
        mask_scale: Pixels of the image to one latent, along a side.

    Raises:
        ImageError: The file has vanished or changed.
    """
    content, mask = read_unchanged(inspected)
    takes_alpha = inspected.mask_hash == ALPHA
    source = inspected.example.source
    return Job(number, source, content, crops, config.alpha_background, mask, takes_alpha, mask_scale)


def decode_job(job: Job) -> DecodedJob:
    """Decode and cut one image; whatever is wrong with it comes back as its refusal."""
    try:
        decoded = decode(job.content, job.background)
        mask = _mask(job, decoded.image.size, decoded.alpha)
        # No pixel of it would count in the loss; whoever drew such a mask meant the inverse, or another file.
        if mask and mask.getextrema() == (0, 0):
            raise ImageError("its mask is black, so there is nothing to learn", "whiten a part of it")
    except ImageError as error:
        return DecodedJob(job.number, job.source, refusal=error.finding(job.source))

    findings = tuple(change.of(job.source) for change in decoded.changes)
    pictures = []
    for key, crop in job.crops.items():
        small_mask = crop.apply_to_mask(mask, job.mask_scale) if mask else None
        pictures.append(Picture(key, crop, crop.apply(decoded.image), small_mask, findings))
    return DecodedJob(job.number, job.source, tuple(pictures))


def decode_all(jobs: Iterable[Job], areas_px: Sequence[int], workers: int | None) -> Iterator[DecodedJob]:
    """The jobs, decoded, in their order.

    Args:
        jobs: Read a few ahead of what is asked for, so their contents are never all in memory.
        areas_px: Pixels of each image.
        workers: Processes; 0 decodes in this one. None chooses: several for many images, where there are
            cores for them; one for a few of which some are large, so that this process, full of libraries,
            stays small.
    """
    if workers is None:
        workers = _choose_workers(areas_px)
    source = iter(jobs)
    while workers:
        pool = _started_pool(workers)
        if pool is None:
            LOGGER.warning("%s", NO_WORKERS)
            break
        with pool:
            crashed = yield from _in_pool(pool, source, workers * AHEAD)
        if not crashed:
            return
        # A decoder ended its process. Which of the images it was shows when each has a worker of its own.
        for job in crashed:
            yield from _alone(job)
        # The rest gets a new pool: a broken one takes no more jobs.

    # No workers, whether asked for or not to be had.
    yield from map(decode_job, source)


def _choose_workers(areas_px: Sequence[int]) -> int:
    cores = os.cpu_count() or 1
    if len(areas_px) >= WORTH_WORKERS and cores > 1:
        return min(4, cores)
    return int(max(areas_px, default=0) > LARGE_PX)


def _started_pool(workers: int) -> ProcessPoolExecutor | None:
    """None where processes cannot be had: in a sandbox without semaphores, in a child of a pool."""
    if multiprocessing.current_process().daemon:
        return None
    try:
        pool = _pool(workers)
        pool.submit(os.getpid).result()
    except (BrokenProcessPool, OSError, ImportError, NotImplementedError):
        return None
    return pool


def _in_pool(
    pool: ProcessPoolExecutor, jobs: Iterator[Job], ahead: int
) -> Generator[DecodedJob, None, list[Job]]:
    """Yield results until the jobs end or a worker dies; returns the jobs that were under way then."""
    waiting: deque[tuple[Job, Any]] = deque()  # with the future of its result
    try:
        while True:
            for job in islice(jobs, ahead - len(waiting)):
                waiting.append((job, None))  # first: submitting may fail, and the job must not be lost
                waiting[-1] = job, pool.submit(decode_job, job)
            if not waiting:
                return []
            # Taken off only once there is a result: what is still in the queue after a crash is tried again.
            decoded = waiting[0][1].result()
            waiting.popleft()
            yield decoded
    except BrokenProcessPool:
        return [job for job, _ in waiting]


def _alone(job: Job) -> Iterator[DecodedJob]:
    with _pool(1) as pool:
        try:
            yield pool.submit(decode_job, job).result()
        except BrokenProcessPool:
            problem = refused("decoding it ended the process", "save it anew as PNG")
            yield DecodedJob(job.number, job.source, refusal=problem.of(job.source))


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, _Context(), _end_with_the_parent)


class _Process(SpawnProcess):
    """A worker that does not run the main script.

    multiprocessing imports it in every worker. One that calls a stage without ``if __name__ == "__main__"``
    would start the stage again in each of them, and one that came by stdin is not there to be imported.
    Nothing that is sent here needs it: jobs and pictures are this file's.
    """

    def start(self) -> None:
        """Start it while the main module looks like that of an interactive session, which has no file."""
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    """Spawned: a forked child of a process that runs torch's threads or CUDA can hang."""

    Process = _Process


def _end_with_the_parent() -> None:
    """In a worker: Ctrl-C is the parent's affair, and a killed parent leaves no worker behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A thread, because a worker that waits for its next job would not notice that nobody sends any more.
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _mask(job: Job, size: tuple[int, int], alpha: Image.Image | None) -> Image.Image | None:
    """The mask in the image's size or of its shape, mode L; None where all is learned."""
    if job.alpha_mask:
        return alpha or Image.new("L", size, 255)
    if job.mask is None:
        return None
    try:
        mask = decode(job.mask).image.convert("L")
    except ImageError as error:
        raise ImageError(f"its mask: {error.problem}", error.action) from error
    # 2 % forgive a mask that was made for a smaller copy, whose sides were rounded.
    if abs(mask.width * size[1] - mask.height * size[0]) > 0.02 * mask.height * size[0]:
        shapes = f"{mask.width}x{mask.height} for {size[0]}x{size[1]}"
        raise ImageError(f"its mask has another shape ({shapes})", "make it the image's")
    return mask
