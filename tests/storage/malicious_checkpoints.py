"""Checkpoints and packs that somebody made by hand: every hash is right, and what is hashed is not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.faults.malicious import DEEP, FORMS, HEADERS, PIPE, safetensors
from benchmarks.faults.small_checkpoints import ABOUT, metrics_at, state_at
from lora_utils.precompute.packs import Layout, encode_header
from lora_utils.storage.checkpoint import STATE, write_checkpoint
from lora_utils.system.files import MANIFEST, commit_folder, read_folder


def _optimizer(states: object, groups: object) -> object:
    return {"dict": [["state", states], ["param_groups", groups]]}


def state_json(**changes: object) -> bytes:
    """The state.json of a checkpoint of step 1, as take_apart writes it, but for entries of its state."""
    entries = {"step": 1, "micro_batches": 2, "skipped": 0, "scaler": {"dict": []}, "average": {"dict": []}}
    entries |= {"adapter": {"dict": []}, "optimizer": _optimizer({"dict": []}, {"list": []})} | changes
    return plain_json(state={"dict": list(entries.items())})


def plain_json(**changes: object) -> bytes:
    """A state.json of which the uppermost entries are given."""
    return json.dumps({"schema": 1, "state": {"dict": []}, "about": ABOUT} | changes).encode()


STATES = {
    "a nesting of 100,000": DEEP.encode(),
    "a nesting of 100,000 in a list": b'{"schema": 1, "about": {}, "state": '
    + b'{"list": [' * 50_000
    + b"]}" * 50_000
    + b"}",
    "a number of 5,000 digits": state_json().replace(b'"step", 1', b'"step", 1' + b"0" * 5000),
    "a step of 10**400": state_json(step=10**400),
    "a step that is NaN": state_json(step=float("nan")),
    "a step without end": state_json(step=float("inf")),
    "a step below 0": state_json(step=-1),
    "a step that is text": state_json(step="1"),
    "a step that is a list": state_json(step={"list": []}),
    "an adapter that is not there": state_json(adapter={"dict": [["a", {"tensor": "adapter.absent"}]]}),
    "an adapter that is a number": state_json(adapter=3),
    "an adapter of numbers": state_json(adapter={"dict": [["a", 3]]}),
    "a tensor by the name of a list": state_json(adapter={"tensor": []}),
    "a kind that is not known": state_json(optimizer={"object": ["os.system"]}),
    "a kind without name": state_json(optimizer={}),
    "two kinds at once": state_json(optimizer={"dict": [], "list": []}),
    "states that are a number": state_json(optimizer=_optimizer(3, {"list": []})),
    "states of numbers": state_json(optimizer=_optimizer({"dict": [[0, 3]]}, {"list": []})),
    "groups that are a number": state_json(optimizer=_optimizer({"dict": []}, 3)),
    "groups of numbers": state_json(optimizer=_optimizer({"dict": []}, {"list": [3]})),
    "a scale without end": state_json(scaler={"dict": [["scale", float("inf")]]}),
    "no state": b'{"schema": 1}',
    "a state that is a list": plain_json(state=[]),
    "a list": b"[]",
    "nothing": b"",
    "a schema that is a list": plain_json(schema=[1]),
    "no fingerprint": plain_json(about={"fingerprint": None}, state=json.loads(state_json())["state"]),
    "a history that is a number": plain_json(
        about=ABOUT | {"history": 1}, state=json.loads(state_json())["state"]
    ),
    "seconds that are text": plain_json(
        about=ABOUT | {"seconds": "1"}, state=json.loads(state_json())["state"]
    ),
    "facts that are a list": plain_json(about=[1], state=json.loads(state_json())["state"]),
}


def _naming(name: str) -> object:
    return {"files": {name: {"bytes": 1, "sha256": "0"}}}


NAMES = {
    **{
        ascii(name): _naming(name) for name in ("../../x", "/etc/hostname", "a/b", "..", "", "a\0b", "\ud800")
    },
    "a name of 5,000 letters": _naming("a" * 5000),
    "a size without end": {"files": {STATE: {"bytes": float("inf"), "sha256": "0"}}},
    "a size that is NaN": {"files": {STATE: {"bytes": float("nan"), "sha256": "0"}}},
    "files that are a list": {"files": [STATE]},
    "a list": [],
}


def checkpoint(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """A committed checkpoint of step 1, every hash right, with the contents of some files replaced."""
    whole = read_folder(write_checkpoint(folder.parent / "whole", state_at(1), ABOUT, metrics_at(1)))
    manifest = contents.get(MANIFEST)
    commit_folder(folder, whole | {name: content for name, content in contents.items() if name != MANIFEST})
    if manifest is not None:
        (folder / MANIFEST).write_bytes(manifest)
    return folder


def checkpoint_with_manifest(folder: Path, manifest: object) -> Path:
    """A checkpoint whose manifest is another one."""
    return checkpoint(folder, {MANIFEST: json.dumps(manifest).encode()})


LAYOUT = Layout((("moments", "F32", (8, 4, 4)),))


def pack(layout: Layout = LAYOUT, count: Any = 1, notes: Any = None, size: int = 512) -> bytes:
    """A pack of that many records, as its writer would make it of such arguments, and bytes for one."""
    return encode_header(layout, count, {} if notes is None else notes) + bytes(48 + size)


def layout_of(*shape: Any) -> Layout:
    """A layout of one tensor."""
    return Layout((("moments", "F32", shape),))


BELOW = encode_header(LAYOUT, -1, {})[8:]
PACKS = {
    **{form: form for form in FORMS},
    **HEADERS,
    "half a record": pack(count=1.5, size=744),
    "a count that is a fraction": pack(count=1.0),
    "a count below 0": safetensors(BELOW, length=len(BELOW) + 48 + 512),
    "a count that is a truth": pack(count=True),
    "no records": pack(count=0, size=-48),
    "records of nothing": pack(Layout(()), size=0),
    "sides of 0": pack(layout_of(0, 4), size=0),
    "sides below 0": pack(layout_of(-4, -32)),
    "sides that are fractions": pack(layout_of(4.0, 32)),
    "notes that are a list": pack(notes=[]),
    "notes of numbers": pack(notes={"a": [[1, 2, 3]]}),
    "notes that are text": pack(notes={"a": "abc"}),
    "notes of an unknown kind": pack(notes={"a": [["b", "c", "lost"]]}),
    "notes of two parts": pack(notes={"a": [["b", "c"]]}),
    "a pipe": PIPE,
}
