"""Whether a weight file is whole: what its header promises against its size, without reading a weight.

A safetensors file is the length of its header (8 bytes), the header (JSON, with where each tensor ends), and
the tensors. Interrupted copies lack the end; clones without Git LFS hold a few lines of text instead.
"""

import json
from pathlib import Path

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_POINTER = b"version https://git-lfs"


def what_is_wrong(file: Path) -> str | None:
    """Why a safetensors file cannot be loaded, and what to do; None of one that is whole by its header."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
        if start == _POINTER:
            return "is a pointer of Git LFS, not the weights; run git lfs pull there, or fetch the model anew"
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        if length > _MOST_HEADER_BYTES:
            return "is no safetensors file; fetch the model anew"
        opened.seek(_LENGTH_BYTES)
        header = opened.read(length)

    if len(start) < _LENGTH_BYTES or len(header) < length:
        return f"is cut short, to {size:,} bytes; fetch the model anew"
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "has a damaged header; fetch the model anew"
    whole = _LENGTH_BYTES + length + end
    if size < whole:
        return f"is cut short, to {size:,} of {whole:,} bytes; fetch the model anew"
    return None
