"""What a card can do, by what it says of itself."""

import pytest
import torch

from lora_utils.system.device import MachineError, choose_precision, compute_capability
from lora_utils.system.device_memory import is_memory_full


@pytest.fixture
def a_card(monkeypatch):
    def a_card(capability, architectures):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)

    return a_card


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [
        ((7, 5), ["sm_75", "sm_80"]),
        ((8, 9), ["sm_75", "sm_80", "sm_90"]),  # code of the same generation
        ((9, 0), ["sm_80", "sm_90a"]),
        ((12, 1), ["sm_80", "compute_120"]),  # compiled when it is loaded
    ],
)
def test_a_card_that_the_build_has_kernels_for(a_card, capability, architectures):
    a_card(capability, architectures)
    assert compute_capability() == capability


@pytest.mark.parametrize("capability", [(6, 0), (7, 0)])
def test_a_card_that_it_has_none_for_is_refused_by_name(a_card, capability):
    a_card(capability, ["sm_75", "sm_80", "sm_86", "sm_90"])
    with pytest.raises(MachineError, match=r"no kernels for Tesla P100, sm_\d0, but for sm_75 sm_80"):
        compute_capability()


def test_bf16_needs_a_card_that_computes_in_it(monkeypatch):
    assert choose_precision("bf16", (8, 0)).name == "bf16"
    assert choose_precision("bf16", None).name == "bf16"  # a CPU does
    with pytest.raises(MachineError, match="mixed_precision=bf16 needs a card from sm_80; this one is sm_75"):
        choose_precision("bf16", (7, 5))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(MachineError, match="accelerate launch"):
        choose_precision("auto", (7, 5))


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_full_card_in_all_its_words(error, is_full):
    assert is_memory_full(error) is is_full
