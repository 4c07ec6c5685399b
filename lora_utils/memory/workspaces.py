"""What cuDNN takes for a moment beside a convolution's operands and result: only a card can tell."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_utils.memory.operators import Convolution
from lora_utils.system.device_memory import forget_peak_memory, free_memory


@torch.no_grad()
def convolution_workspace(
    convolutions: Iterable[Convolution], dtype: torch.dtype, device: torch.device
) -> int:
    """The largest workspace of any of these convolutions on a CUDA card, in bytes; each is run once.

    Which algorithm cuDNN chooses, and so what it takes, depends on card, version and shape; what torch's
    allocator gives for it counts among the bytes of tensors while the convolution runs.

    Args:
        convolutions: Of a footprint.
        dtype: They compute in.
        device: A CUDA card.
    """
    largest = max((_workspace(each, dtype, device) for each in convolutions), default=0)
    free_memory()
    return largest


def _workspace(convolution: Convolution, dtype: torch.dtype, device: torch.device) -> int:
    x = torch.zeros(convolution.input, dtype=dtype, device=device)
    weight = torch.zeros(convolution.weight, dtype=dtype, device=device)
    form = (*convolution[2:5], False, [0] * (len(convolution.input) - 2), convolution.groups)
    output = torch.ops.aten.convolution(x, weight, None, *form)

    forget_peak_memory()
    before = torch.cuda.memory_allocated()
    if convolution.is_backward:
        made = torch.ops.aten.convolution_backward(output, x, weight, None, *form, [True, False, False])[0]
    else:
        made = torch.ops.aten.convolution(x, weight, None, *form)
    assert isinstance(made, Tensor)
    kept = torch.cuda.memory_allocated() - before
    return torch.cuda.max_memory_allocated() - before - kept
