"""The instrument: it refuses what a CUDA device refuses, and computes what the CPU computes."""

import pytest
import torch
from torch.nn import functional as F

CARD = torch.device("cuda")


def test_torch_believes_in_it():
    assert torch.cuda.is_available()
    assert torch.cuda.get_device_name() == "Tesla T4"
    assert torch.cuda.get_device_capability() == (7, 5)
    free, total = torch.cuda.mem_get_info()
    assert 14 < free / 2**30 < total / 2**30 < 15


def test_tensors_of_two_devices_do_not_meet():
    on_card = torch.ones(3, device=CARD)
    with pytest.raises(RuntimeError, match="same device"):
        on_card + torch.ones(3)
    assert (on_card + torch.tensor(1.0)).device.type == "cuda"  # a number may come from the host


def test_generators_of_the_cpu_are_refused_and_its_own_draw_the_same():
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=CARD, generator=torch.Generator())
    own = torch.Generator(device=CARD).manual_seed(3)
    other = torch.Generator().manual_seed(3)
    assert torch.equal(torch.randn(5, device=CARD, generator=own).cpu(), torch.randn(5, generator=other))


def test_what_is_drawn_on_the_card_leaves_the_cpu_s_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    first = torch.rand(4, device=CARD)
    assert torch.equal(torch.rand(4), expected)
    with torch.random.fork_rng([CARD]):
        torch.manual_seed(5)
        assert torch.equal(torch.rand(4, device=CARD), first)


def test_memory_is_counted_in_blocks_and_runs_out(card):
    before = torch.cuda.memory_allocated()
    tensor = torch.empty(1000, dtype=torch.uint8, device=CARD)
    assert torch.cuda.memory_allocated() - before == 1024
    del tensor
    assert torch.cuda.memory_allocated() == before
    card.set_limit(before + (1 << 20))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 << 20, dtype=torch.uint8, device=CARD)


def test_an_allocation_fails_when_it_is_told_to_with_what_it_is_told(card):
    card.fail_after(2, "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    torch.empty(3, device=CARD)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        torch.empty(3, device=CARD)
    torch.empty(3, device=CARD)


def test_copies_from_pinned_memory_come_when_somebody_waits():
    values = torch.arange(6.0)
    pinned = values.pin_memory()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        on_card = pinned.to(CARD, non_blocking=True)
    assert on_card.isnan().all()
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(on_card.cpu(), values)

    back = torch.full((6,), -1.0).pin_memory()
    back.copy_(on_card, non_blocking=True)
    written = torch.cuda.Event()
    written.record()
    on_card.zero_()  # comes after the copy in its stream
    assert (back == -1).all()
    written.synchronize()
    assert torch.equal(back, values)


def test_waits_and_copies_are_counted(card):
    on_card = torch.ones(3).to(CARD)
    on_card.sum().item()
    on_card.cpu()
    torch.cuda.synchronize()
    counts = card.counts()
    assert counts[card.UPLOAD] == 1
    assert counts[card.DOWNLOAD] == 1
    assert counts[card.WAIT] == 3


def test_attention_takes_the_kernel_that_a_t4_has_and_computes_what_the_cpu_does(card):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 16, 8, generator=generator).requires_grad_() for _ in range(2))
    on_card = [tensor.detach().to(CARD).requires_grad_() for tensor in (query, key)]
    F.scaled_dot_product_attention(query, key, key).square().sum().backward()
    F.scaled_dot_product_attention(*on_card, on_card[1]).square().sum().backward()
    assert card.counts()["fused attention"] == 1
    for expected, found in zip((query, key), on_card, strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        assert torch.equal(found.grad.cpu(), expected.grad)
