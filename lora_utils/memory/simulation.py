"""Runs a model on the meta device and counts what it would have taken: bytes, kernels, operations. No memory,
no GPU.

The one place that knows torch's private side: ``TorchDispatchMode`` and the address of a storage. On meta,
attention would fall apart into matrix products; while a simulation runs, ``scaled_dot_product_attention`` is
the fused kernel, which keeps queries, keys, values, output and log-sums for backward.
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
    Convolution,
    Work,
    bytes_of,
    class_of,
    convolution_of,
    flops_of,
    form_of,
    shape_of,
)

ROUND_BYTES = 512  # of CUDA's caching allocator
# Of the operators that a U-Net calls, what autocast computes in half precision, and what in fp32.
LOW = ("linear", "conv2d", "scaled_dot_product_attention")
HIGH = ("group_norm", "layer_norm", "mse_loss", "softmax")


class SimulationError(UserError):
    """The installed torch cannot be simulated, so nothing can be forecast."""


@dataclass
class Span:
    """A module's forward, by what had been counted when it began and when it ended."""

    first: int
    """Operators that had run before."""
    given: list[int]
    """Serial numbers of the storages that the module was given."""
    created: int
    """Storages that had been made before."""
    end: int = 0
    """Storages that had been made when it ended."""
    output: int = 0
    """Serial number of the storage that it returned."""


@dataclass(frozen=True)
class Unit:
    """What recomputing a module would free and cost; see ``Simulation.units``."""

    freed_bytes: int
    work: Work


class _Storage(NamedTuple):
    reference: weakref.ref
    """Kept so that its callback is called when the storage is gone."""
    size: int
    """Bytes, rounded as the allocator rounds."""
    serial: int
    made: int
    """Operators that had run until then."""


class Simulation(TorchDispatchMode):
    """Counts storages by their lifetime while it is entered; tensors on other devices than meta count for
    nothing.

    A storage counts from the operator that made it until nothing refers to it, as in torch's own allocators.
    """

    def __init__(self, workspace_bytes: int = 0) -> None:
        """Start to count.

        Args:
            workspace_bytes: That each convolution takes while it runs.
        """
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.phases: dict[str, int] = {}
        """Peak of each phase in bytes, in order."""
        self.trace: list[tuple[int, int]] = []
        """Storage and bytes, negative when freed; for ``allocator.replay``."""
        self.spans: dict[str, Span] = {}
        """By the names of watched modules."""
        self.convolutions: set[Convolution] = set()
        self._workspace_bytes = workspace_bytes
        self._phase = ""
        self._live: dict[int, _Storage] = {}  # by address, which is used again once it is free
        self._sizes: list[int] = []  # by serial number, which is not
        self._work: list[tuple[str, float, int]] = []  # class, operations and bytes of each operator
        self._forms: dict[tuple, Any] = {}  # of results, by the operator and the shapes that it was given

    def start(self, phase: str) -> None:
        """Peaks count for this phase from now on."""
        self._phase = phase
        self.phases[phase] = max(self.live_bytes, self.phases.get(phase, 0))

    def hold(self, tensors: Iterable[Tensor], share: float = 1.0) -> None:
        """Count tensors that were made before, or a share of their bytes if they stand for smaller ones."""
        for tensor in tensors:
            self._count(tensor, share)

    @property
    def operators(self) -> int:
        """How many have run."""
        return len(self._work)

    def watch(self, name: str, module: nn.Module) -> None:
        """Remember the span of a module's forward; it must run once."""

        # Serial numbers, not storages: a reference of its own would keep alive what is to be counted.
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

        Freed is what the module made and still keeps, its output aside, less what it was given and would have
        to keep. Recomputation stops, as torch's does, once the last tensor that backward wants is there
        again.
        """
        live = {storage.serial: storage for storage in self._live.values()}
        return {name: self._unit(span, live) for name, span in self.spans.items()}

    def _unit(self, span: Span, live: dict[int, _Storage]) -> Unit:
        kept = []
        for serial in range(span.created, span.end):
            if serial in live and serial != span.output:
                kept.append(live[serial])

        # A recomputed module keeps its inputs, also those that nothing else keeps alive until backward.
        kept_more = sum(self._sizes[serial] for serial in set(span.given) - live.keys())
        freed_bytes = sum(storage.size for storage in kept) - kept_more
        last = max((storage.made for storage in kept), default=span.first)
        return Unit(freed_bytes, self.work(span.first, last))

    def work(self, first: int = 0, last: int | None = None) -> Work:
        """Of the operators from first to last; of all when not given."""
        flops_by_class: dict[str, float] = dict.fromkeys((GEMM, CONV, ATTENTION, OTHER), 0.0)
        streamed_bytes = 0
        operators = self._work[first:last]
        for operator_class, flops, streamed in operators:
            flops_by_class[operator_class] += flops
            streamed_bytes += streamed
        del flops_by_class[OTHER]
        return Work(len(operators), flops_by_class, streamed_bytes)

    def _serial(self, tensor: Tensor) -> int:
        return self._live[tensor.untyped_storage()._cdata].serial

    def __enter__(self) -> "Simulation":
        super().__enter__()
        # In the module, where diffusers looks it up at each call: a dispatch mode sees it only taken apart.
        self._attention = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = _fused_attention
        return self

    def __exit__(self, *error: Any) -> None:
        functional.scaled_dot_product_attention = self._attention
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operator_class = class_of(func)
        # What makes a view shares its input's storage, which only the operator itself can give.
        out = func(*args, **kwargs) if operator_class is None else self._repeat(func, args, kwargs)
        outputs = out if isinstance(out, tuple | list) else (out,)
        if operator_class is not None:
            flops = flops_of(func, operator_class, args, outputs)
            self._work.append((operator_class, flops, bytes_of(args, outputs)))
        if operator_class == CONV:
            self.convolutions.add(convolution_of(func, args))
        for tensor in outputs:
            if isinstance(tensor, Tensor):
                self._count(tensor)
        if operator_class == CONV and self._workspace_bytes:  # forgotten as soon as it is counted
            self._count(torch.empty(self._workspace_bytes, dtype=torch.uint8, device=META))
        return out

    def _repeat(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator, or only make what it made the last time of such inputs: several times faster."""
        key = func, shape_of(args), shape_of(tuple(kwargs.items()))
        form = self._forms.get(key)
        if form is None:
            out = func(*args, **kwargs)
            self._forms[key] = form_of(func, out, args, kwargs)
            return out
        if isinstance(form, str):  # written to an argument, which is returned
            return kwargs[form] if form else args[0]
        is_tuple, *forms = form
        outputs = tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in forms
        )
        return outputs if is_tuple else outputs[0]

    def _count(self, tensor: Tensor, share: float = 1.0) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live or tensor.device != META:  # a view of what is counted already
            return
        size = storage.nbytes()
        if not size:
            return

        size = math.ceil(size * share / ROUND_BYTES) * ROUND_BYTES
        reference = weakref.ref(storage, partial(self._forget, address))
        self._live[address] = _Storage(reference, size, len(self._sizes), self.operators)
        self._sizes.append(size)
        if size:
            self.trace.append((address, size))
        # The only place where memory grows, and so the only one where a peak can be.
        self.live_bytes += size
        if self.live_bytes > self.phases.get(self._phase, 0):
            self.phases[self._phase] = self.live_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, address: int, _: Any) -> None:
        size = self._live.pop(address).size
        if size:
            self.trace.append((address, -size))
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
            f"torch {torch.__version__} has no dispatch modes that a step could be simulated with, so what "
            "fits cannot be forecast; install an older torch, or train with gradient_checkpointing=full"
        )


@contextmanager
def imitated_autocast(dtype: torch.dtype) -> Iterator[dict[int, Tensor]]:
    """Cast as torch's autocast does on a GPU; that one does nothing on the meta device.

    It patches ``torch.nn.functional``: a TorchFunctionMode is not active where checkpointing recomputes.
    Yields the casts that are kept; clear them where the real context would end.
    """
    casts: dict[int, Tensor] = {}

    def lowered(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        # Autocast keeps the casts of parameters until it ends, and of nothing else.
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
    """``scaled_dot_product_attention`` by the one fused kernel that also runs on meta, the CPU's."""
    flash = getattr(torch.ops.aten, FLASH)
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
