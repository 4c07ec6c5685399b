"""The GPU's memory: how much was used, giving it back, and an error that says what to do when it is full."""

import gc
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_utils import UserError
from lora_utils.system.units import GIB

LIBRARIES_SAY = re.compile(
    r"out of memory|STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_INTERNAL_ERROR",
    re.IGNORECASE,
)
"""A full card, in the words of CUDA, cuBLAS, cuDNN and bitsandbytes, which raise plain RuntimeErrors."""


class MemoryFullError(UserError):
    """Something does not fit the GPU's memory."""


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that the GPU's memory is full, whoever raised it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(LIBRARIES_SAY.search(str(error)))


def free_memory() -> None:
    """Collect what nothing refers to any more and return cached blocks to the device."""
    # Models that refer to themselves are freed by the collector alone, and only then can their blocks be
    # returned.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def device_given_back(advice: str) -> Iterator[None]:
    """What was loaded inside is off the device afterwards, however it ended; a decorator, too.

    Args:
        advice: What to do where the card was full.

    Raises:
        MemoryFullError: The card was full, and nobody inside knew what to do about it.
    """
    try:
        yield
    except BaseException as error:
        shortage = _shortage() if is_memory_full(error) else ""
        # A notebook keeps the last error, its traceback, and so what every frame of it holds: a whole U-Net.
        if torch.cuda.is_available():
            traceback.clear_frames(error.__traceback__)
        if shortage:
            raise MemoryFullError(f"{shortage}; {advice}") from None
        raise
    finally:
        if torch.cuda.is_available():
            free_memory()
            cap_memory(None)


def cap_memory(usable_gib: float | None) -> None:
    """Let torch take so much more than its tensors have now, and no more; without a figure, all of the card.

    On a card that torch may fill to the last byte, it is a library beside torch that finds it full: cuBLAS
    when its second handle is made, or a kernel that is loaded late. And those do not say so in one voice.
    """
    if not torch.cuda.is_available():
        return
    total = torch.cuda.mem_get_info()[1]
    wanted = total if usable_gib is None else usable_gib * GIB + torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, wanted / total)))


def peak_memory_gib() -> float | None:
    """Most memory of tensors on the GPU since the start, or since it was forgotten; None without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def forget_peak_memory() -> None:
    """Let ``peak_memory_gib`` count from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _shortage() -> str:
    """Who has the card's memory: another program's share is the usual reason."""
    if not torch.cuda.is_available():
        return "the memory is full"
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    others = max(0, total - free - own)
    return (
        f"the GPU's memory is full: of {total / GIB:.1f} GiB this process has {own / GIB:.1f}, and other "
        f"programs and CUDA have {others / GIB:.1f}"
    )
