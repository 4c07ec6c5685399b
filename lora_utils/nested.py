"""Nested states, such as an optimiser's, as tensors and JSON, without pickle; every number comes back bit by bit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LIST, TUPLE, DICT, TENSOR = "list", "tuple", "dict", "tensor"


def take_apart(state: object) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a state by names of their own, on the CPU, and all the rest as what JSON can hold.

    Tensors that are on the CPU already are not copied.

    Args:
        state: Dicts, lists and tuples of tensors, numbers, strings, bools and None; keys are strings or numbers.

    Raises:
        TypeError: There is something else in it.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # a tensor that several share stays one
    return tensors, _apart(state, "", tensors, names)


def put_together(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """The state that was taken apart.

    Raises:
        ValueError, TypeError, LookupError, RecursionError: It is nothing that was taken apart.
    """
    if not isinstance(rest, dict):
        return rest
    [(kind, value)] = rest.items()
    if kind == TENSOR:
        return tensors[value]
    if kind == DICT:
        return {key: put_together(tensors, part) for key, part in value}
    if kind not in (LIST, TUPLE):
        raise ValueError(f"there is no kind {kind!r:.40}")
    parts = [put_together(tensors, part) for part in value]
    return tuple(parts) if kind == TUPLE else parts


def _apart(state: object, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if isinstance(state, Tensor):
        if id(state) not in names:
            names[id(state)] = path.strip(".")
            tensor = state.detach().cpu().contiguous()
            shares = tensor.untyped_storage().nbytes() != tensor.nbytes  # which safetensors refuses
            tensors[path.strip(".")] = tensor.clone() if shares else tensor
        return {TENSOR: names[id(state)]}
    if isinstance(state, Mapping):
        if not all(isinstance(key, str | int | float) for key in state):
            raise TypeError(f"{path}: keys must be strings or numbers")
        return {DICT: [[key, _apart(part, f"{path}.{key}", tensors, names)] for key, part in state.items()]}
    if isinstance(state, list | tuple):
        parts = [_apart(part, f"{path}.{place}", tensors, names) for place, part in enumerate(state)]
        return {TUPLE if isinstance(state, tuple) else LIST: parts}
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"{path} is a {type(state).__name__}, which a checkpoint cannot hold")
