"""Equal bytes on a GPU: torch's deterministic algorithms, for as long as a run lasts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_utils.system.device import MachineError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")
"""With these alone cuBLAS adds up in one order (its manual, "Results reproducibility")."""


@contextmanager
def deterministic_algorithms(is_wanted: bool) -> Iterator[None]:
    """Nothing adds up in the order in which blocks of threads end, where it is wanted; a CPU never does.

    Without it a T4's attention does, in its backward pass (torch's attention_backward.cu), and cuDNN may.

    Raises:
        MachineError: CUDA has started in this process, with another way of cuBLAS to work.
    """
    if not is_wanted or not torch.cuda.is_available():
        yield
        return
    if os.environ.get(WORKSPACE) not in FIXED_WORKSPACES:
        if torch.cuda.is_initialized():
            raise MachineError(
                "deterministic=true has to be known before CUDA starts: restart the notebook's kernel and "
                f"train first, or set the environment variable {WORKSPACE}={FIXED_WORKSPACES[0]} before"
            )
        os.environ[WORKSPACE] = FIXED_WORKSPACES[0]

    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    # What has no such algorithm warns by name instead of ending an evening's run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        torch.backends.cudnn.benchmark = benchmark
