"""Executes a notebook whose kernel is killed in one of its cells, then all of it again, as a user would."""

import contextlib
import os
import signal
import threading
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from benchmarks.record import ROOT

TIMEOUT_SECONDS = 600


def with_parameters(name: str, **values: Any) -> nbformat.NotebookNode:
    """A notebook of the project with a filled-in form."""
    return parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb")), values)


def code_cells(notebook: nbformat.NotebookNode) -> list[int]:
    """Indices of the cells that run."""
    return [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]


def kill_in_cell(notebook: nbformat.NotebookNode, index: int, after_seconds: float) -> bool:
    """Run the cells before this one, then kill the kernel in it; whether that was before the cell's end."""
    client = _client(notebook)
    with client.setup_kernel(env=_environment()):
        for earlier in code_cells(notebook):
            if earlier < index:
                client.execute_cell(notebook.cells[earlier], earlier)

        # By pid: a client that kills its kernel itself starts another.
        assert client.km is not None
        pid = client.km.provisioner.pid
        with contextlib.suppress(DeadKernelError):
            timer = threading.Timer(after_seconds, os.kill, (pid, signal.SIGKILL))
            timer.start()
            client.execute_cell(notebook.cells[index], index)
            timer.cancel()  # the cell was quicker; killed after it, the machine is gone all the same
            os.kill(pid, signal.SIGKILL)
            return False
    return True


def run_all(notebook: nbformat.NotebookNode) -> None:
    """Every cell in a new kernel; an error of a cell is raised."""
    _client(notebook).execute(env=_environment())


def _client(notebook: nbformat.NotebookNode) -> NotebookClient:
    folder = {"metadata": {"path": str(ROOT)}}
    return NotebookClient(notebook, timeout=TIMEOUT_SECONDS, kernel_name="python3", resources=folder)


def _environment() -> dict[str, str]:
    # Without the first, the kernel's debugger warns of frozen modules in every cell.
    return os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONPATH": str(ROOT)}
