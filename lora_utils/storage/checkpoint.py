"""Checkpoints: all that a run needs to go on as if it had never stopped, in folders that are committed whole.

A checkpoint is ``step-000000123`` with the adapter in fp32, the optimiser's states, a weight average where
there is one (safetensors), ``state.json`` with counts and settings, and ``metrics.jsonl`` so far. Nothing in
it can run code, and nothing of the base model is in it.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora_utils import UserError
from lora_utils.system.files import (
    DamagedError,
    check_folder,
    commit_folder,
    nearest_existing,
    problem_of,
    read_folder,
    remove,
    set_aside,
)

LOGGER = logging.getLogger(__name__)
STEP = re.compile(r"^step-(\d{9})$")
SCHEMA = 1
STATE = "state.json"
METRICS = "metrics.jsonl"
OTHERS = "optimizer"
"""The file of all tensors that are no weights."""
WEIGHTS = ("adapter", "average")
FOREIGN = ("optimizer.bin", "random_states_0.pkl", "optimizer.pt", "trainer_state.json", "scheduler.bin")
"""Files of accelerate's and transformers' checkpoints."""
NOTHING = {
    "fingerprint": {"fixed": {}, "free": {}},
    "seconds": 0.0,
    "history": [],
    "held_out_loss_before": None,
}
MARGIN_BYTES = 64 * 2**20
"""Left to the log and whatever else writes on the same disk."""
# How a container of a state is named in state.json.
LIST = "list"
TUPLE = "tuple"
DICT = "dict"
TENSOR = "tensor"


class CheckpointError(UserError):
    """A checkpoint cannot be made, read or used."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was read and found sound."""

    folder: Path
    state: dict[str, Any]
    """For ``TrainingState.load_state_dict``."""
    about: dict[str, Any]
    """What was written beside it: fingerprint (the run's identity), seconds, history,
    held_out_loss_before.
    """
    metrics: bytes
    """metrics.jsonl up to its step."""

    @property
    def step(self) -> int:
        """Optimiser updates that it has behind it."""
        return self.state["step"]


def step_of(name: str) -> int | None:
    """The step that a checkpoint's folder name gives; None of every other name, such as
    ``step-000000004 (1)``.
    """
    match = STEP.match(name)
    return int(match[1]) if match else None


def newest(parent: Path, number_of: Callable[[str], int | None]) -> list[Path]:
    """Folders whose name is a number to ``number_of``, the highest first; all other names are left alone."""
    if not parent.is_dir():
        return []
    numbered = []
    for path in parent.iterdir():
        number = number_of(path.name)
        if number is not None and path.is_dir():
            numbered.append((number, path))
    return [path for _, path in sorted(numbered, reverse=True)]


def write_checkpoint(
    parent: Path, state: Mapping[str, Any], about: Mapping[str, Any], metrics: bytes
) -> Path:
    """Commit a checkpoint; one of this step that is there already is replaced only if it is damaged.

    Args:
        parent: The run's checkpoints.
        state: From ``TrainingState.state_dict``; tensors may be on any device.
        about: What JSON can hold.
        metrics: metrics.jsonl up to the state's step.

    Raises:
        CheckpointError: The adapter holds NaN or infinity, and is not written.
        OSError: The disk is full, or failed; nothing was changed.
    """
    folder = parent / f"step-{state['step']:09d}"
    for file in WEIGHTS:
        for name, tensor in state[file].items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name} is not finite, so step {state['step']} was not saved")

    # Weights get files of their own, so that a person can take an adapter out of a checkpoint.
    tensors, rest = flatten_state(dict(state))
    parts: dict[str, dict[str, Tensor]] = {file: {} for file in (*WEIGHTS, OTHERS)}
    for name, tensor in tensors.items():
        root = name.partition(".")[0]
        parts[root if root in WEIGHTS else OTHERS][name] = tensor
    contents = {f"{file}.safetensors": save(part) for file, part in parts.items() if part}
    contents[STATE] = json.dumps({"schema": SCHEMA, "state": rest, "about": about}).encode()
    contents[METRICS] = metrics

    if folder.exists():
        if problem_of(folder) is None:
            return folder  # equal steps of a run are equal states: there is nothing better to write
        set_aside(folder)
    commit_folder(folder, contents)
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, every byte checked.

    Raises:
        CheckpointError: Another program or version made it; says what to do.
        DamagedError: It is not what was committed, or no checkpoint.
    """
    # Their files are pickles: even to look what is in them would run them.
    if foreign := next((name for name in FOREIGN if (folder / name).exists()), None):
        raise CheckpointError(
            f"{folder} was made by another program ({foreign}): its files can run code when they are opened, "
            "and it lacks what an exact continuation needs; start anew with resume_from_checkpoint=none"
        )
    contents = read_folder(folder)
    try:
        plain = json.loads(contents[STATE])
        if plain["schema"] != SCHEMA:
            raise CheckpointError(
                f"{folder} has layout {plain['schema']}; go on with the version that wrote it"
            )
        tensors = {}
        for name, content in contents.items():
            if name.endswith(".safetensors"):
                tensors |= load(content)
        state = unflatten_state(tensors, plain["state"])
        checkpoint = Checkpoint(folder, state, NOTHING | plain["about"], contents[METRICS])
        _check(checkpoint)
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise DamagedError(f"it lacks what a checkpoint has ({reason})") from error
    # A folder that was renamed by hand would put the run at a step that it has not reached.
    if step_of(folder.name) not in (None, checkpoint.step):
        raise DamagedError(f"it holds step {checkpoint.step}")
    return checkpoint


def newest_checkpoint(parent: Path) -> Checkpoint | None:
    """The newest sound checkpoint; those above it that are damaged are set aside, with a warning.

    Raises:
        CheckpointError: The disk cannot read any; to start anew then would lose what may be there.
    """
    problems = []
    unread = None
    for folder in newest(parent, step_of):
        step = step_of(folder.name) or 0
        try:
            checkpoint = read_checkpoint(folder)
        except DamagedError as error:
            if isinstance(error.__cause__, OSError):  # the disk's fault, not the folder's: it may be whole
                unread = error
                problems.append((step, f"the checkpoint of step {step} is left out: {error}"))
            else:
                name = set_aside(folder).name
                problems.append(
                    (step, f"the checkpoint of step {step} is damaged ({error}) and now called {name}")
                )
            continue

        for lost_step, problem in problems:
            repeated = lost_step - checkpoint.step
            LOGGER.warning(
                "%s; going on from step %d: %d steps are repeated", problem, checkpoint.step, repeated
            )
        return checkpoint

    if unread:
        raise CheckpointError(
            f"no checkpoint in {parent} can be read: {unread}; check the disk and run again"
        ) from unread
    for _, problem in problems:
        LOGGER.warning("%s; there is no older one, so the run starts anew", problem)
    return None


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Delete all but the newest sound checkpoints; damaged ones are set aside.

    Raises:
        OSError: The disk failed.
    """
    sound = 0
    for folder in newest(parent, step_of):
        if sound >= keep:
            remove(folder)
            continue
        try:
            check_folder(folder)
            sound += 1
        except DamagedError as error:
            step = step_of(folder.name)
            name = set_aside(folder).name
            LOGGER.warning("the checkpoint of step %d is damaged (%s) and now called %s", step, error, name)


def require_space(parent: Path, size_bytes: int) -> None:
    """Ask for room for two more checkpoints and a margin.

    Args:
        parent: The run's checkpoints; need not be there yet.
        size_bytes: Of one checkpoint.

    Raises:
        CheckpointError: There is less.
    """
    free = shutil.disk_usage(nearest_existing(parent)).free
    needed = 2 * size_bytes + MARGIN_BYTES
    if free < needed:
        raise CheckpointError(
            f"checkpoints need {needed / 2**20:,.0f} MiB in {parent} and {free / 2**20:,.0f} MiB are free; "
            "free some, or choose another output_dir"
        )


def flatten_state(state: object) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a state by names of their own, on the CPU, and all the rest as what JSON can hold.

    Tensors that are on the CPU already are not copied.

    Args:
        state: Dicts, lists and tuples of tensors, numbers, strings, bools and None; keys are strings or
            numbers.

    Raises:
        TypeError: There is something else in it.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # a tensor that several share stays one
    return tensors, _flatten(state, "", tensors, names)


def unflatten_state(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """The state that ``flatten_state`` took apart.

    Raises:
        ValueError, TypeError, LookupError, RecursionError: It is nothing that was taken apart.
    """
    if not isinstance(rest, dict):
        return rest
    # Each container was written as an object with one key, its kind.
    [(container, value)] = rest.items()
    if container == TENSOR:
        return tensors[value]
    if container == DICT:
        return {key: unflatten_state(tensors, item) for key, item in value}
    if container not in (LIST, TUPLE):
        raise ValueError(f"there is no kind {container!r:.40}")
    items = [unflatten_state(tensors, item) for item in value]
    return tuple(items) if container == TUPLE else items


def _flatten(state: object, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if isinstance(state, Tensor):
        if id(state) not in names:
            name = path.strip(".")
            names[id(state)] = name
            tensor = state.detach().cpu().contiguous()
            is_view = tensor.untyped_storage().nbytes() != tensor.nbytes  # which safetensors refuses
            tensors[name] = tensor.clone() if is_view else tensor
        return {TENSOR: names[id(state)]}
    if isinstance(state, Mapping):
        if not all(isinstance(key, str | int | float) for key in state):
            raise TypeError(f"{path}: keys must be strings or numbers")
        # Pairs, not an object: JSON would turn the numbers among the keys into strings.
        return {DICT: [[key, _flatten(item, f"{path}.{key}", tensors, names)] for key, item in state.items()]}
    if isinstance(state, list | tuple):
        items = [_flatten(item, f"{path}.{index}", tensors, names) for index, item in enumerate(state)]
        return {TUPLE if isinstance(state, tuple) else LIST: items}
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"{path} is a {type(state).__name__}, which a checkpoint cannot hold")


def _check(checkpoint: Checkpoint) -> None:
    """What hashes do not tell: a folder that somebody made by hand has the right ones too.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RuntimeError: Something cannot be what was
            written.
    """
    state = checkpoint.state
    about = checkpoint.about
    counts = {name: state[name] for name in ("step", "skipped")}
    wrong = [name for name, count in counts.items() if type(count) is not int or not 0 <= count < 10**9]
    wrong += [name for name in (*WEIGHTS, "optimizer", "scaler") if not isinstance(state[name], dict)]
    wrong += [name for name in ("fixed", "free") if not isinstance(about["fingerprint"][name], dict)]
    wrong += [name for name in ("seconds", "held_out_loss_before") if not _is_number(about[name] or 0.0)]
    if not isinstance(about["history"], list):
        wrong.append("history")
    wrong += [name for name, number in state["scaler"].items() if not _is_number(number)]

    states = state["optimizer"]["state"]
    groups = state["optimizer"]["param_groups"]
    if not all(isinstance(entry, dict) for entry in (states, *states.values(), *groups)):
        wrong.append("optimizer")
    for file in WEIGHTS:
        for name, tensor in state[file].items():
            if not (tensor.is_floating_point() and tensor.isfinite().all()):
                wrong.append(name)
    if state["average"] and _shapes(state["average"]) != _shapes(state["adapter"]):
        wrong.append("average")
    if wrong:
        raise ValueError(f"{', '.join(map(str, wrong[:3]))} cannot be what was written")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # false for NaN
