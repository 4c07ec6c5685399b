"""Makes files that run code, hang or take all memory where they are trusted, and watches what happens."""

import io
import json
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_utils import UserError

PATIENCE_SECONDS = 5
"""CPU time within which a file must be refused."""
MORE_MIB = 300
"""Memory that refusing it may take."""
FORMS = ("pickle", "torch.save", "old torch.save")
"""Payloads: files that run code when they are loaded. Before torch 1.6 ``torch.save`` wrote no zip."""
CODE = "a module"
OBJECTS = "an array of objects"
PIPE = "a pipe"
DEEP = "[" * 100_000
"""JSON that overflows the stack of a parser that calls itself."""


def code(canary: Path) -> str:
    """A module that leaves the canary when it is imported, with classes of every name that is asked for.

    A library that looks up a class in it is served, so that nothing but the canary tells of the import.
    """
    return (
        f"open({str(canary)!r}, 'a').write('ran')\ndef __getattr__(name):\n    return type(name, (), {{}})\n"
    )


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        # What pickle calls to make the object again: any function, with any arguments.
        return exec, (f"open({str(self.canary)!r}, 'a').write('ran')",)


def payload(canary: Path, form: str = "pickle") -> bytes:
    """A pickle that leaves the canary when it is loaded."""
    if form == "pickle":
        return pickle.dumps({"weights": _Payload(canary)})
    content = io.BytesIO()
    state = {"weights": torch.zeros(2), "more": _Payload(canary)}
    torch.save(state, content, _use_new_zipfile_serialization=form == "torch.save")
    return content.getvalue()


def object_array(canary: Path) -> bytes:
    """An .npy file of objects."""
    content = io.BytesIO()
    np.save(content, np.array([_Payload(canary)], dtype=object), allow_pickle=True)
    return content.getvalue()


def spoil(folder: Path, changes: Mapping[str, Any], canary: Path) -> None:
    """Change files of a folder.

    Args:
        folder: Made where it is absent.
        changes: File to what it becomes: None removes it, a mapping sets fields of its JSON, bytes and other
            lists are its content; one of FORMS is a payload, and CODE, OBJECTS and PIPE are what they say.
        canary: What a payload leaves.
    """
    makers: dict[str, Callable[[], bytes]] = {form: lambda form=form: payload(canary, form) for form in FORMS}
    makers |= {CODE: lambda: code(canary).encode(), OBJECTS: lambda: object_array(canary)}
    for name, change in changes.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(change, dict):
            change = json.dumps(json.loads(file.read_text()) | change).encode()
        # Removed in any case: mkfifo takes no name that is taken, and None asks for nothing more.
        file.unlink(missing_ok=True)
        if change == PIPE:
            os.mkfifo(file)  # whoever opens it waits for a writer, for ever
        elif change is not None:
            file.write_bytes(makers[change]() if isinstance(change, str) else change)


def message_of(work: Callable[[], object]) -> str:
    """What the user is told, empty if nothing: within seconds, in little memory, and never a traceback."""

    def give_up(*_: object) -> None:
        raise AssertionError("it hangs")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()  # not the clock: other work on the machine is no fault of the file
    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(6 * PATIENCE_SECONDS)  # what waits takes no CPU time; the machine may be busy, though
    try:
        work()
        message = ""
    except UserError as error:
        message = str(error) or "nothing"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)

    # ru_maxrss is a peak: before and after, it tells of memory that has long been freed again.
    assert time.process_time() - started < PATIENCE_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_MIB * 2**10
    return message


def assert_refused(work: Callable[[], object], *words: object) -> None:
    """It ends in a message that holds these words."""
    message = message_of(work)
    assert message, "it was accepted"
    assert all(str(word) in message for word in words), message


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, however wrong.

    Args:
        header: Made into JSON; bytes are taken as they are.
        data: What follows the header.
        length: That the file claims for its header; the true one when it is None.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one_tensor(**changes: object) -> dict[str, Any]:
    """A header of one tensor of four numbers, but for the changes."""
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


def _two(first: list[int], second: list[int]) -> dict[str, Any]:
    offsets = {"a": first, "b": second}
    return {name: {"dtype": "F32", "shape": [2], "data_offsets": pair} for name, pair in offsets.items()}


TWICE = json.dumps(one_tensor())[:-1] + ", " + json.dumps(one_tensor())[1:]
HEADERS = {
    # No file of this format at all, or less of it than it says.
    "no bytes at all": b"",
    "seven bytes": bytes(7),
    "a header of length 0": safetensors(b""),
    "a header of 2**63 bytes": safetensors(one_tensor(), bytes(16), 2**63),
    "a header longer than the file": safetensors(one_tensor(), bytes(16), 4096),
    "a header of more than 100 MB": safetensors(one_tensor(), bytes(16), 100_000_001),
    "a header cut short": safetensors(json.dumps(one_tensor()).encode()[:-9], bytes(16)),
    # A header of the right length that cannot be read, or not in one way only.
    "no JSON": safetensors(b"{a: 1}", bytes(16)),
    "no UTF-8": safetensors(b'{"\xff\xfe": 1}', bytes(16)),
    "a list": safetensors([], bytes(16)),
    "a nesting of 100,000": safetensors(DEEP.encode(), bytes(16)),
    "a key that is there twice": safetensors(TWICE.encode(), bytes(16)),
    # Offsets that reach where they must not.
    "tensors that overlap": safetensors(_two([0, 8], [4, 12]), bytes(12)),
    "tensors with a hole between": safetensors(_two([0, 8], [12, 20]), bytes(20)),
    "offsets below 0": safetensors(one_tensor(data_offsets=[-16, 0]), bytes(16)),
    "offsets that run backwards": safetensors(one_tensor(data_offsets=[16, 0]), bytes(16)),
    "offsets beyond the file": safetensors(one_tensor(shape=[2**40], data_offsets=[0, 2**42]), bytes(16)),
    # Types and shapes that do not make the number of bytes.
    "an unknown dtype": safetensors(one_tensor(dtype="O"), bytes(16)),
    "no dtype": safetensors({"a": {"shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
    "a shape that overflows": safetensors(one_tensor(shape=[2**62, 8]), bytes(16)),
    "a shape below 0": safetensors(one_tensor(shape=[-2, -2]), bytes(16)),
    "a shape of other size": safetensors(one_tensor(shape=[3]), bytes(16)),
    "bytes after the end": safetensors(one_tensor(), bytes(48)),
    # Sound to a parser, and wrong for whoever uses what it read.
    "metadata that is no text": safetensors({"__metadata__": {"a": [1]}} | one_tensor(), bytes(16)),
    "another file's name for a tensor": safetensors({"../../x": one_tensor()["a"]}, bytes(16)),
    "numbers that are not finite": safetensors(one_tensor(), np.full(4, np.nan, np.float32).tobytes()),
    "no tensors": safetensors({}),
}
