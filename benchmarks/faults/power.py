"""What a power cut can leave on a disk: bytes that were not synced, and names that were not, in every state.

The model: a file's bytes are safe after its own fsync, the names in a folder after the folder's. Of a file that was
not synced the disk holds all, nothing, the first half, or zeros; of the names in a folder that was not synced the new
ones, the old ones, or the old ones without those that were deleted.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.operations import Operation

DATA = ("all", "none", "half", "zeros")
NAMES = ("present", "absent", "deleted")


@dataclass
class _File:
    content: bytes = b""
    is_synced: bool = False

    def left(self, data: str) -> bytes:
        if self.is_synced or data == "all":
            return self.content
        size = len(self.content)
        return {"none": b"", "half": self.content[: size // 2], "zeros": bytes(size)}[data]


@dataclass
class _Folder:
    now: dict[str, "_File | _Folder"] = field(default_factory=dict)
    synced: dict[str, "_File | _Folder"] = field(default_factory=dict)

    def left(self, names: str) -> dict[str, "_File | _Folder"]:
        if names == "present":
            return self.now
        if names == "absent":
            return self.synced
        return {name: self.synced[name] for name in self.synced if name in self.now}


class Disk:
    """A folder as the kernel sees it and as the disk has it."""

    def __init__(self, root: Path) -> None:
        """Start from what is there, all of it safe."""
        self.root = root.resolve()
        self._tree = _read(self.root)

    def apply(self, done: Iterable[Operation]) -> None:
        """Carry out operations, in the order of their happening."""
        for one in done:
            if one.kind == "fsync":
                self._sync(one.path)
            if one.kind == "fsync" or one.path == self.root:  # which was there
                continue
            parent, name = self._folder(one.path.parent), one.path.name
            if one.kind == "create":
                parent.now[name] = _File()
            elif one.kind == "write":
                file = parent.now[name]
                assert isinstance(file, _File)
                file.content, file.is_synced = file.content + one.content, False
            elif one.kind == "mkdir":
                parent.now.setdefault(name, _Folder())
            elif one.kind == "rename":
                assert one.target is not None
                self._folder(one.target.parent).now[one.target.name] = parent.now.pop(name)
            else:
                parent.now.pop(name, None)

    def cut_power(self, folder: Path, data: str, names: str) -> None:
        """Write what the disk may hold after a cut at this moment."""
        _write(self._tree, folder, data, names)

    def _sync(self, path: Path) -> None:
        node: _File | _Folder = self._tree if path == self.root else self._folder(path.parent).now[path.name]
        if isinstance(node, _File):
            node.is_synced = True
        else:
            node.synced = dict(node.now)

    def _folder(self, path: Path) -> _Folder:
        node: _File | _Folder = self._tree
        for part in path.relative_to(self.root).parts:
            assert isinstance(node, _Folder)
            node = node.now[part]
        assert isinstance(node, _Folder)
        return node


def _read(path: Path) -> _Folder:
    nodes = {
        one.name: _read(one) if one.is_dir() else _File(one.read_bytes(), True) for one in path.iterdir()
    }
    return _Folder(dict(nodes), dict(nodes))


def _write(tree: _Folder, folder: Path, data: str, names: str) -> None:
    os.mkdir(folder)
    for name, node in tree.left(names).items():
        if isinstance(node, _File):
            (folder / name).write_bytes(node.left(data))
        else:
            _write(node, folder / name, data, names)
