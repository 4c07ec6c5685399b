"""What a power cut can leave on a disk: bytes that were not synced, and names that were not, in every state.

The model: a file's bytes are safe after its own fsync, the names in a folder after the folder's. Of a file
that was not synced the disk holds all, nothing, the first half, or zeros; of the names in a folder that was
not synced the new ones, the old ones, or the old ones without those that were deleted.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.operations import Operation

DATA = ("all", "none", "half", "zeros")
"""What the disk may hold of a file that was not synced."""
NAMES = ("present", "absent", "deleted")
"""What it may hold of the changes to a folder that was not synced; *deleted*: only deletions arrived."""


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
    """As the kernel shows it to every process."""
    synced: dict[str, "_File | _Folder"] = field(default_factory=dict)
    """As of its last fsync."""

    def left(self, names: str) -> dict[str, "_File | _Folder"]:
        if names == "present":
            return self.now
        if names == "absent":
            return self.synced
        # File systems may write a deletion before the creation that came before it.
        return {name: self.synced[name] for name in self.synced if name in self.now}


class Disk:
    """A folder as the kernel sees it and as the disk has it."""

    def __init__(self, root: Path) -> None:
        """Start from what is there, all of it safe."""
        self.root = root.resolve()
        self._tree = _read(self.root)

    def apply(self, done: Iterable[Operation]) -> None:
        """Carry out operations, in the order of their happening."""
        for operation in done:
            if operation.action == "fsync":
                self._sync(operation.path)
            elif operation.path != self.root:  # which was there, whatever makes it again
                self._change(operation)

    def cut_power(self, folder: Path, data: str, names: str) -> None:
        """Write what the disk may hold after a cut at this moment.

        Args:
            folder: Made; must not exist.
            data: One of ``DATA``, for all files alike.
            names: One of ``NAMES``, for all folders alike.
        """
        _write(self._tree, folder, data, names)

    def _change(self, operation: Operation) -> None:
        parent = self._folder(operation.path.parent)
        name = operation.path.name

        if operation.action == "create":
            parent.now[name] = _File()
        elif operation.action == "write":
            file = parent.now[name]
            assert isinstance(file, _File)
            file.content += operation.content
            file.is_synced = False  # what was safe of it before is not told apart: the worse case
        elif operation.action == "mkdir":
            parent.now.setdefault(name, _Folder())
        elif operation.action == "rename":
            assert operation.target is not None
            # The node moves with what of it is safe: a rename syncs no bytes.
            self._folder(operation.target.parent).now[operation.target.name] = parent.now.pop(name)
        else:
            parent.now.pop(name, None)

    def _sync(self, path: Path) -> None:
        node: _File | _Folder = self._tree if path == self.root else self._folder(path.parent).now[path.name]
        if isinstance(node, _File):
            node.is_synced = True
        else:
            node.synced = dict(node.now)  # names alone: the files behind them are as safe as they were

    def _folder(self, path: Path) -> _Folder:
        node: _File | _Folder = self._tree
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, _Folder)
            node = node.now[name]
        assert isinstance(node, _Folder)
        return node


def _read(path: Path) -> _Folder:
    # Now and synced share their nodes: a file is one, whatever names point at it.
    nodes = {
        entry.name: _read(entry) if entry.is_dir() else _File(entry.read_bytes(), True)
        for entry in path.iterdir()
    }
    return _Folder(dict(nodes), dict(nodes))


def _write(tree: _Folder, folder: Path, data: str, names: str) -> None:
    os.mkdir(folder)
    for name, node in tree.left(names).items():
        if isinstance(node, _File):
            (folder / name).write_bytes(node.left(data))
        else:
            _write(node, folder / name, data, names)
