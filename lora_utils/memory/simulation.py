"""Runs a model on the meta device and counts what it would have taken: bytes, kernels, operations. No memory, no GPU.

The one place that knows torch's private side: ``TorchDispatchMode`` and the address of a storage. On meta, attention
would fall apart into matrix products; while a simulation runs, ``scaled_dot_product_attention`` is the fused kernel,
which keeps queries, keys, values, output and log-sums for backward.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lora_utils import UserError
from lora_utils.memory.operators import (
    ATTENTION,
    CONV,
    FLASH,
    GEMM,
    META,
    OTHER,
    Work,
    bytes_of,
    flops_of,
    form_of,
    kind_of,
    shape_of,
)

LOW = ("linear", "conv2d", "scaled_dot_product_attention")
HIGH = ("group_norm", "layer_norm", "mse_loss", "softmax")


@contextmanager
def imitated_autocast(dtype: torch.dtype) -> Iterator[dict[int, Tensor]]:
    """Patch ``torch.nn.functional``: a TorchFunctionMode is not active where checkpointing recomputes.

    Yields the casts that are kept; clear them where the real context would end.
    """
    casts: dict[int, Tensor] = {}

    def lowered(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in casts:
            casts[id(value)] = value.to(dtype)
        return casts[id(value)]

    def raised(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == dtype else value

    originals = {name: getattr(functional, name) for name in LOW + HIGH}
    for name, original in originals.items():
        setattr(functional, name, _with_cast(original, lowered if name in LOW else raised))
    try:
        yield casts
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)


def _with_cast(original: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return original(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return call


ROUND_BYTES = 512  # of CUDA's caching allocator


class SimulationError(UserError):
    """The installed torch cannot be simulated, so nothing can be forecast."""


@dataclass
class Span:
    """A module's forward: operators that had run before, storages that were given, created until the end, returned."""

    first: int
    given: list[int]
    created: int
    end: int = 0
    output: int = 0


@dataclass(frozen=True)
class Unit:
    """What recomputing a module would free and cost; see ``Simulation.units``."""

    freed_bytes: int
    work: Work


class _Storage(NamedTuple):
    reference: weakref.ref
    size: int
    serial: int
    made: int
    """Operators that had run until then."""


class Simulation(TorchDispatchMode):
    """Counts storages by their lifetime while it is entered; tensors on other devices than meta count for nothing.

    A storage counts from the operator that made it until nothing refers to it, as in torch's own allocators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.phases: dict[str, int] = {}
        """Peak of each phase in bytes, in order."""
        self.trace: list[tuple[int, int]] = []
        """Storage and bytes, negative when freed; for ``allocator.replay``."""
        self.spans: dict[str, Span] = {}
        self._phase = ""
        self._live: dict[int, _Storage] = {}  # by address, which is used again once it is free
        self._sizes: list[int] = []  # by serial number, which is not
        self._work: list[tuple[str, float, int]] = []
        self._known: dict[tuple, Any] = {}

    def start(self, phase: str) -> None:
        """Peaks count for this phase from now on."""
        self._phase = phase
        self.phases[phase] = max(self.live_bytes, self.phases.get(phase, 0))

    def hold(self, tensors: Iterable[Tensor], share: float = 1.0) -> None:
        """Count tensors that were made before, or a share of their bytes where something smaller stands for them."""
        for tensor in tensors:
            self._count(tensor, share)

    @property
    def operators(self) -> int:
        """How many have run."""
        return len(self._work)

    def watch(self, name: str, module: nn.Module) -> None:
        """Remember the span of a module's forward; it must run once."""

        def before(module: nn.Module, args: Any) -> None:
            given = [self._serial(tensor) for tensor in args if isinstance(tensor, Tensor)]
            self.spans[name] = Span(self.operators, given, len(self._sizes))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.spans[name].end = len(self._sizes)
            self.spans[name].output = self._serial(output if isinstance(output, Tensor) else output[0])

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def units(self) -> dict[str, Unit]:
        """Of all watched modules, at the end of the forward pass.

        Freed is what the module made and still keeps, its output aside, less what it was given and would have to keep.
        Recomputation stops, as torch's does, once the last tensor that backward wants is there again.
        """
        live = {storage.serial: storage for storage in self._live.values()}
        return {name: self._unit(span, live) for name, span in self.spans.items()}

    def _unit(self, span: Span, live: dict[int, _Storage]) -> Unit:
        made = [
            live[serial]
            for serial in range(span.created, span.end)
            if serial in live and serial != span.output
        ]
        kept_more = sum(self._sizes[serial] for serial in set(span.given) - live.keys())
        last = max((one.made for one in made), default=span.first)
        return Unit(sum(one.size for one in made) - kept_more, self.work(span.first, last))

    def work(self, first: int = 0, last: int | None = None) -> Work:
        """Of the operators from first to last; of all when not given."""
        sums: dict[str, float] = dict.fromkeys((GEMM, CONV, ATTENTION, OTHER), 0.0)
        part = self._work[first:last]
        for kind, flops, _ in part:
            sums[kind] += flops
        return Work(
            len(part),
            {kind: sums[kind] for kind in (GEMM, CONV, ATTENTION)},
            sum(streamed for *_, streamed in part),
        )

    def _serial(self, tensor: Tensor) -> int:
        return self._live[tensor.untyped_storage()._cdata].serial

    def __enter__(self) -> "Simulation":
        super().__enter__()
        self._attention = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = _fused_attention
        return self

    def __exit__(self, *error: Any) -> None:
        functional.scaled_dot_product_attention = self._attention
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = self._repeat(func, args, kwargs) if kind_of(func) else func(*args, **kwargs)
        outputs = out if isinstance(out, tuple | list) else (out,)
        if kind := kind_of(func):
            self._work.append((kind, flops_of(func, kind, args, outputs), bytes_of(args, outputs)))
        for tensor in outputs:
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _repeat(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator, or only make what it made the last time of inputs like these: several times faster."""
        key = func, shape_of(args), shape_of(tuple(kwargs.items()))
        known = self._known.get(key)
        if known is None:
            out = func(*args, **kwargs)
            self._known[key] = form_of(func, out, args, kwargs)
            return out
        if isinstance(known, str):
            return kwargs[known] if known else args[0]
        made = tuple(torch.empty_strided(*form[:2], dtype=form[2], device=META) for form in known[1:])
        return made if known[0] else made[0]

    def _count(self, tensor: Tensor, share: float = 1.0) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tensor.device != META or not (size := storage.nbytes()):
            return
        size = math.ceil(size * share / ROUND_BYTES) * ROUND_BYTES
        reference = weakref.ref(storage, partial(self._forget, key))
        self._live[key] = _Storage(reference, size, len(self._sizes), self.operators)
        self._sizes.append(size)
        if size:
            self.trace.append((key, size))
        self.live_bytes += size
        if self.live_bytes > self.phases.get(self._phase, 0):
            self.phases[self._phase] = self.live_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, _: Any) -> None:
        size = self._live.pop(key).size
        if size:
            self.trace.append((key, -size))
        self.live_bytes -= size


def is_supported() -> bool:
    """Whether this torch still has what a simulation needs: tried on one attention, there and back."""
    query = torch.empty(1, 1, 8, 8, device=META, requires_grad=True)
    try:
        with Simulation() as simulation:
            functional.scaled_dot_product_attention(query, query, query).sum().backward()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return simulation.peak_bytes > 0 and simulation.work().flops[ATTENTION] > 0


def require_support() -> None:
    """Ask before a forecast: an attention of a millisecond is cheaper than an error in the midst of a model.

    Raises:
        SimulationError: ``is_supported`` says no.
    """
    if not is_supported():
        raise SimulationError(
            f"torch {torch.__version__} has no dispatch modes that a step could be simulated with, so what fits "
            "cannot be forecast; install an older torch, or train with gradient_checkpointing=full"
        )


@contextmanager
def on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Modules and tensors that are made here take no memory; floating ones have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with META:
            yield
    finally:
        torch.set_default_dtype(before)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    flash = getattr(torch.ops.aten, FLASH)
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
