"""The lean step: a U-Net with adapters gets the nodes of ``lean_ops``, which keep less and launch fewer
kernels.

Parameters and results stay the same; modules, names and the state dict stay diffusers' and peft's. What is
not plain (DoRA, several adapters, merged or disabled ones, other kinds of blocks) goes on through its own
forward.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lora_utils.model import lean_ops
from lora_utils.model.lora import ADAPTER
from lora_utils.model.quantisation import dequantised_weight


def make_lean(unet: UNet2DConditionModel) -> None:
    """Replace forward passes; call once, when the adapter is attached and all is on its device.

    The compute copies of the adapter have the dtype of the base and are renewed before every forward pass;
    the parameters themselves must stay the same objects.
    """
    modules: list[Any] = list(unet.modules())
    dtype = unet.conv_in.weight.dtype

    # Attention first: what it takes together must not get a node of its own below.
    leans: list[LeanLinears] = []
    for module in modules:
        if isinstance(module, Attention):
            leans += _lean_attention(module, dtype)
    fused = {layer for lean in leans for layer in lean.layers}

    for module in modules:
        if isinstance(module, LoraLayer):
            if module not in fused and _is_plain_linear(module):
                leans.append(LeanLinears([module], dtype))
                _give(module, partial(_lora_forward, module, leans[-1]))
            elif _is_plain_conv(module):
                _give(module, partial(_lora_conv_forward, module))
        else:
            _make_lean(module)

    # The lists are made once: looking for a thousand parameters before every forward pass takes milliseconds.
    copies = [copy for lean in leans for copy in lean.copies]
    masters = [master for lean in leans for master in lean.masters]
    unet.register_forward_pre_hook(partial(_renew, leans, copies, masters))


def _make_lean(module: Any) -> None:
    """A module without an adapter."""
    if isinstance(module, GEGLU):
        _give(module, partial(_geglu_forward, module))
    elif isinstance(module, ResnetBlock2D) and _is_plain_resnet(module):
        _give(module, partial(_resnet_forward, module))
    elif isinstance(module, nn.Conv2d) and not module.weight.requires_grad and module.padding_mode == "zeros":
        _give(module, partial(lean_ops.frozen_conv2d, conv=module))
    elif _is_quantised(module):
        linear: Any = module
        weight = partial(dequantised_weight, linear)
        _give(linear, partial(lean_ops.frozen_linear, weight=weight, bias=linear.bias))


def _give(module: Any, forward: Callable[..., Tensor]) -> None:
    """On the instance, in front of its class's own: hooks, names and the state dict stay as they are."""
    module.forward = forward


class LeanLinears:
    """Peft's linear layers that share an input, as one node."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        """Take over the base's weights and make compute copies of the adapters'.

        Args:
            layers: Plain ones, alike in outputs, rank and scale.
            dtype: What the node computes in.
        """
        self.layers = layers
        bases = [layer.get_base_layer() for layer in layers]
        weight: Callable[[], Tensor] = partial(dequantised_weight, bases[0])
        if len(layers) > 1:
            stacked = torch.cat([base.weight.detach() for base in bases])
            rows = stacked.split([base.out_features for base in bases])
            for base, view in zip(bases, rows, strict=True):
                base.weight = nn.Parameter(view, requires_grad=False)  # a view: nothing is kept twice
            weight = partial(_given, stacked)

        # Masters in fp32, which the optimiser moves: all A, then all B.
        count = len(layers)
        downs = [layer.lora_A[ADAPTER].weight for layer in layers]
        ups = [layer.lora_B[ADAPTER].weight for layer in layers]
        self.masters = [*downs, *ups]

        # Copies in the compute dtype, views of two tensors, so that one product serves all layers.
        down = torch.cat([master.detach().to(dtype) for master in downs])
        up = torch.stack([master.detach().to(dtype) for master in ups])
        self.copies = [*down.chunk(count), *up]
        self._projection = lean_ops.Projection(weight, bases[0].bias, down, up, layers[0].scaling[ADAPTER])
        self.renew()

    def renew(self) -> None:
        """Look at the layers again: whether the adapter is on and alone, and dropout."""
        self.usable = all(
            not layer.disable_adapters and not layer.merged and layer.active_adapters == [ADAPTER]
            for layer in self.layers
        )
        dropout = self.layers[0].lora_dropout[ADAPTER]  # an Identity, without a p, where there is none
        self._dropout = dropout if dropout.training and getattr(dropout, "p", 0) > 0 else None

    def __call__(self, x: Tensor) -> Tensor:
        dropped = None if self._dropout is None else self._dropout(x)
        return lean_ops.lora_linear(x, dropped, self._projection, self.masters)


def _attention_forward(
    attn: Any,
    together: LeanLinears,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention as diffusers', with q, k and v (or k and v, where they see the text) from one node.

    (B, tokens, channels) to the same.
    """
    # A call that this node was not made for, of self-attention with a text say, takes diffusers' own way.
    unexpected = (encoder_hidden_states is not None) != (len(together.layers) == 2)
    if unexpected or attention_mask is not None or kwargs or not together.usable or hidden_states.ndim != 3:
        return type(attn).forward(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    projected = together(hidden_states if encoder_hidden_states is None else encoder_hidden_states)
    projections = list(projected.chunk(len(together.layers), dim=-1))
    if len(projections) == 2:  # k and v of the text; q sees the picture
        projections.insert(0, attn.to_q(hidden_states))
    query, key, value = (
        projection.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for projection in projections
    )
    out = F.scaled_dot_product_attention(query, key, value)  # scale and softmax as diffusers' processor
    return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _lean_attention(attn: Any, dtype: torch.dtype) -> list[LeanLinears]:
    """Give it the forward above, where nothing but plain attention with plain adapters is in it."""
    unusual = (
        attn.spatial_norm,
        attn.group_norm,
        attn.norm_q,
        attn.norm_k,
        attn.norm_cross,
        attn.residual_connection,
    )
    if type(attn.processor) is not AttnProcessor2_0 or any(unusual) or attn.rescale_output_factor != 1:
        return []
    layers = [attn.to_k, attn.to_v] if attn.is_cross_attention else [attn.to_q, attn.to_k, attn.to_v]
    if not all(_is_plain_linear(layer) and _is_stackable(layer) for layer in layers):
        return []

    # One batched product needs adapters of one shape, and the node has one scale.
    forms = {(layer.out_features, layer.r[ADAPTER], layer.scaling[ADAPTER]) for layer in layers}
    if len(forms) > 1:
        return []
    together = LeanLinears(layers, dtype)
    _give(attn, partial(_attention_forward, attn, together))
    return [together]


def _is_plain_linear(layer: Any) -> bool:
    is_adapted = isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear)
    return is_adapted and ADAPTER in layer.lora_A and _is_vanilla(layer)


def _is_plain_conv(layer: Any) -> bool:
    return isinstance(layer, LoraConv2d) and ADAPTER in layer.lora_A and _is_vanilla(layer)


def _is_vanilla(layer: Any) -> bool:
    """No variant such as DoRA, and no bias in the update."""
    return not layer.lora_variant and layer.lora_B[ADAPTER].bias is None


def _is_stackable(layer: Any) -> bool:
    """Codes cannot be stacked with their scales, and with dropout each layer sees another input."""
    base = layer.get_base_layer()
    return not _is_quantised(base) and base.bias is None and not getattr(layer.lora_dropout[ADAPTER], "p", 0)


def _is_quantised(layer: Any) -> bool:
    """Whether this is a linear layer of bitsandbytes."""
    if not isinstance(layer, nn.Linear):
        return False
    return hasattr(layer.weight, "quant_type") or layer.weight.dtype == torch.int8


def _is_plain_resnet(block: Any) -> bool:
    unusual = (
        block.upsample,
        block.downsample,
        block.skip_time_act,
        block.dropout.p,
        block.output_scale_factor != 1,
    )
    timed = block.time_emb_proj is not None and block.time_embedding_norm == "default"
    return timed and not any(unusual) and isinstance(block.nonlinearity, nn.SiLU)


@torch.no_grad()
def _renew(leans: Sequence[LeanLinears], copies: list[Tensor], masters: list[Tensor], *_: object) -> None:
    """An update may have moved the masters since, and adapters may have been turned off."""
    for lean in leans:
        lean.renew()
    if leans:
        torch._foreach_copy_(copies, masters)  # a few kernels for all of them, casts included


def _lora_forward(layer: Any, lean: LeanLinears, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    if args or kwargs or not lean.usable:
        return type(layer).forward(layer, x, *args, **kwargs)
    return lean(x)


def _lora_conv_forward(layer: Any, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """An adapted convolution that computes in x's dtype: peft would cast x to the masters' fp32."""
    if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
        return type(layer).forward(layer, x, *args, **kwargs)
    down = layer.lora_A[ADAPTER]
    up = layer.lora_B[ADAPTER]
    seen = layer.lora_dropout[ADAPTER](x)
    low = F.conv2d(seen, down.weight.to(x.dtype), None, down.stride, down.padding, down.dilation)
    # The scale on the weights, (C', r, 1, 1), which are smaller than any picture.
    update = F.conv2d(low, (up.weight * layer.scaling[ADAPTER]).to(x.dtype))
    return layer.base_layer(x) + update


def _geglu_forward(block: Any, hidden_states: Tensor) -> Tensor:
    return lean_ops.geglu(block.proj(hidden_states))


def _resnet_forward(block: Any, input_tensor: Tensor, temb: Tensor) -> Tensor:
    """Norm, SiLU and convolution twice, the timestep's embedding between them, and the shortcut."""
    hidden = block.conv1(lean_ops.group_norm_silu(input_tensor, block.norm1))
    hidden = hidden + block.time_emb_proj(F.silu(temb))[:, :, None, None]
    hidden = block.conv2(lean_ops.group_norm_silu(hidden, block.norm2))
    return (input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor)) + hidden


def _given(weight: Tensor) -> Tensor:
    return weight
