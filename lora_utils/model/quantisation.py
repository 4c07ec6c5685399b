"""Linears whose frozen weights are kept in 8 or 4 bits, by bitsandbytes, and back to numbers.

int8: one scale per output row, absmax / 127 (Dettmers et al., 2022, LLM.int8()). nf4: the 16 quantiles of a
normal distribution, one scale per 64 values, the scales in 8 bits themselves (Dettmers et al., 2023, QLoRA,
section 3).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_utils import UserError

Quantised = Literal["int8", "nf4"]
NF4_BLOCK = 64  # values that share a scale


@dataclass(frozen=True)
class LeftInFull:
    """Linears of the transformers that a precision cannot hold, and that stay in the compute dtype."""

    linears: int
    of: int
    """How many there are in all."""
    share: float
    """Of all those linears' weights, in [0, 1]."""

    def __str__(self) -> str:
        return (
            f"{self.linears} of {self.of} linears stay in full ({self.share:.0%} of the weights): "
            f"nf4 takes inputs in multiples of {NF4_BLOCK}"
        )


class QuantisationError(UserError):
    """Weights cannot be quantised on this machine."""


def transformer_linears(unet: nn.Module) -> dict[str, nn.Linear]:
    """What is quantised, by name: 86 % of SDXL's weights. Embeddings are small and sensitive."""
    linears = {}
    for name, module in unet.named_modules():
        if ".attentions." in name and isinstance(module, nn.Linear):
            linears[name] = module
    return linears


def can_hold(precision: Quantised, linear: nn.Linear) -> bool:
    """Whether a linear can be kept in this precision."""
    # bitsandbytes 0.50 reads scales that span rows wrongly on a CPU; SDXL has no such rows.
    return precision == "int8" or linear.in_features % NF4_BLOCK == 0


def left_in_full(unet: nn.Module, precision: str) -> LeftInFull | None:
    """What of a U-Net without adapters stays in full; None where all is quantised, or nothing is to be.

    Args:
        unet: Before or after its linears were replaced.
        precision: A value of the setting base_precision.
    """
    if precision != "nf4":
        return None
    weights = {True: 0, False: 0}
    count = 0
    linears = transformer_linears(unet).values()
    for linear in linears:
        held = can_hold(precision, linear)
        weights[held] += linear.in_features * linear.out_features
        count += not held
    return LeftInFull(count, len(linears), weights[False] / sum(weights.values())) if count else None


def quantise_linears(model: nn.Module, names: list[str], precision: Quantised, dtype: torch.dtype) -> None:
    """Replace linears of a model on the meta device by bitsandbytes' own, still without weights.

    Args:
        model: Marked too, as peft, accelerate and diffusers expect of a quantised model.
        names: Of the linears; what nf4 cannot hold stays as it is.
        precision: int8 or nf4.
        dtype: What they compute in; bitsandbytes' own default, fp32, is slow in silence.

    Raises:
        QuantisationError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt
    except ImportError as error:
        raise QuantisationError(
            f"base_precision={precision} needs bitsandbytes: pip install bitsandbytes, "
            "or set base_precision=auto"
        ) from error

    class ContiguousLinear8bitLt(Linear8bitLt):
        """Rounds what it is given, however that lies in memory."""

        # bitsandbytes 0.50's CUDA kernel reads row after row from the first address and asks for no strides,
        # and a transformer's proj_in is given a transposed view whenever the batch is 1.
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.contiguous())

    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        if not can_hold(precision, old):
            continue
        shape = (old.in_features, old.out_features, old.bias is not None)
        if precision == "nf4":
            new = Linear4bit(*shape, dtype, compress_statistics=True, quant_type="nf4", device="meta")
            new.support_avx512bf16_for_cpu = False  # it would repack weights that others read too
        else:
            new = ContiguousLinear8bitLt(*shape, has_fp16_weights=False, device="meta")
            vars(new)["compute_dtype"] = dtype
        model.set_submodule(name, new.requires_grad_(False))
    setattr(model, "is_loaded_in_4bit" if precision == "nf4" else "is_loaded_in_8bit", True)


def frozen_parameter(module: nn.Module, name: str, tensor: Tensor) -> nn.Parameter:
    """What a module keeps of one of its tensors: quantised where it is the weight of a quantised linear.

    Args:
        module: Any; its parameter of this name may be on meta.
        name: weight, bias and so on.
        tensor: In the module's compute dtype, on the device where it will stay.
    """
    old: Any = module.get_parameter(name)
    if hasattr(old, "quant_type"):  # Params4bit
        return type(old)(tensor, requires_grad=False, quant_type="nf4", module=module).to(tensor.device)
    if hasattr(old, "has_fp16_weights"):  # Int8Params would quantise only on the way from the CPU to a GPU
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(tensor.half())
        return type(old)(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return nn.Parameter(tensor, requires_grad=False)


def dequantised_weight(linear: nn.Linear) -> Tensor:
    """The weight as a matrix in the linear's compute dtype, (out, in); of a plain linear the weight itself.

    One allocation of that size at most, beside nf4's scales. No gradient flows through it.
    """
    weight: Any = linear.weight
    if hasattr(weight, "quant_type"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if weight.dtype != torch.int8:
        return weight
    quantised: Any = linear
    row_max = quantised.state.SCB if weight.SCB is None else weight.SCB  # moved there by the first forward
    matrix = torch.empty(weight.shape, dtype=quantised.compute_dtype, device=weight.device)
    # The scale stays fp32, because fp16 has few digits below 6e-5.
    return torch.mul(weight.data, (row_max / 127).unsqueeze(1), out=matrix)
