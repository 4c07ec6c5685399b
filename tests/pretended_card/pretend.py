"""Makes torch believe in a CUDA card: ``install()``, before anything has imported torch.

Tensors are of device cuda:0; values are the CPU's (see operators.cpp). Below torch.cuda's own Python code,
which runs as it is, the functions of its C++ part are replaced by these.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.pretended_card.build import build

CONTEXT_BYTES = 300 * 2**20
"""Of CUDA itself, which no tensor can have."""


@dataclass(frozen=True)
class PretendedCard:
    """What a card says of itself."""

    name: str
    total_bytes: int
    capability: tuple[int, int]
    multiprocessors: int


CARDS = {
    "t4": PretendedCard("Tesla T4", 15828320256, (7, 5), 40),
    "l4": PretendedCard("NVIDIA L4", 23663083520, (8, 9), 58),
    "p100": PretendedCard("Tesla P100-PCIE-16GB", 17066885120, (6, 0), 56),
    "h100": PretendedCard("NVIDIA H100 80GB HBM3", 85029158912, (9, 0), 132),
}
ARCHITECTURES = "sm_75 sm_80 sm_86 sm_90"
"""What the pretended build of torch has kernels for."""


def install(name: str = "t4") -> Any:
    """Pretend a card of ``CARDS``, for the rest of this process.

    Returns:
        The compiled module, which counts: allocated(), peak(), counts(), fail_after(n, message) and others.

    Raises:
        RuntimeError: torch was imported before; it looks for devices but once.
        FileNotFoundError: There is no C++ compiler.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the card has to be pretended before torch is imported")
    library = str(build())
    ctypes.CDLL(library, os.RTLD_GLOBAL)  # its hooks must be registered when torch looks for them
    import torch  # noqa: F401

    loader = importlib.machinery.ExtensionFileLoader("pretended", library)
    spec = importlib.util.spec_from_loader("pretended", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["pretended"] = module
    _import_what_looks_for_drivers()
    _replace(module, CARDS[name])
    return module


def _import_what_looks_for_drivers() -> None:
    # bitsandbytes would load its CUDA library, for which there is no driver; so it takes its CPU library.
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401


def _replace(module: Any, card: PretendedCard) -> None:
    import torch

    module.set_limit(card.total_bytes - CONTEXT_BYTES)
    for name, function in _c_functions(module, card).items():
        setattr(torch._C, name, function)
    for name, value in _attributes(module, card).items():
        setattr(torch.cuda, name, value)
    for name, function in _accelerator_functions().items():
        setattr(torch.accelerator, name, function)
    torch.version.cuda = "12.8"


def _c_functions(module: Any, card: PretendedCard) -> dict[str, Any]:
    from tests.pretended_card import streams

    def stats(_: int) -> dict[str, Any]:
        now = {"current": module.allocated(), "peak": module.peak(), "allocated": 0, "freed": 0}
        return {
            "allocated_bytes": {"all": now},
            "reserved_bytes": {"all": now},
            "num_ooms": module.failures(),
        }

    def set_fraction(fraction: float, _: int) -> None:
        module.set_cap(int(fraction * card.total_bytes))

    return {
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": lambda _: None,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_synchronize": streams.synchronize,
        "_cuda_emptyCache": module.wait_for_all,  # it waits for the card, too
        "_cuda_ipc_collect": lambda: None,
        "_cuda_memoryStats": stats,
        "_cuda_resetPeakMemoryStats": lambda _: module.reset_peak(),
        "_cuda_setMemoryFraction": set_fraction,
        "_cuda_getArchFlags": lambda: ARCHITECTURES,
        "_cuda_getCurrentRawStream": lambda _: module.current_stream(),
        "_cuda_getAllocatorBackend": lambda: "native",
        "_has_cuda": True,
    }


def _attributes(module: Any, card: PretendedCard) -> dict[str, Any]:
    from tests.pretended_card import streams

    major, minor = card.capability
    properties = SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        total_memory=card.total_bytes,
        multi_processor_count=card.multiprocessors,
        is_integrated=False,
        L2_cache_size=4 * 2**20,
        warp_size=32,
    )

    def memory_left(_: int) -> tuple[int, int]:
        return max(0, module.limit() - module.allocated()), card.total_bytes

    return {
        "_initialized": True,
        "_cudart": SimpleNamespace(cudaMemGetInfo=memory_left),
        "_get_device_properties": lambda _: properties,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "default_generators": (module.default_generator(),),
        "is_current_stream_capturing": lambda: False,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "current_stream": streams.current_stream,
        "default_stream": streams.default_stream,
        "stream": streams.entered,
        "set_stream": streams.set_stream,
    }


def _accelerator_functions() -> dict[str, Any]:
    import torch

    from tests.pretended_card import streams

    return {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "synchronize": lambda _=None: streams.synchronize(),
        "empty_cache": lambda: None,
    }


def installed() -> ModuleType | None:
    """The compiled module, where this process has pretended a card."""
    return sys.modules.get("pretended")
