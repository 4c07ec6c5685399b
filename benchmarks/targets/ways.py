"""Sets of layers that a LoRA may adapt, by name, for any U-Net of SDXL's topology."""

import re
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from lora_utils.model.lora import CONVOLUTIONS, LINEARS

ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
ALL_LINEARS = "(" + "|".join(re.escape(name) for name in LINEARS) + ")"
ALL_CONVOLUTIONS = "(" + "|".join(re.escape(name) for name in CONVOLUTIONS) + ")"


@dataclass(frozen=True)
class Way:
    """A set of layers."""

    name: str
    pattern: str
    """Matched at the end of a layer's name."""
    conv_share: float = 1.0
    """Rank of convolutions, as a share of the linears'."""

    def layers(self, unet: UNet2DConditionModel) -> list[str]:
        """Names of the layers of this U-Net; it may be on the meta device."""
        pattern = re.compile(rf"(.*\.)?{self.pattern}")
        return [name for name, _ in unet.named_modules() if pattern.fullmatch(name)]

    def conv_rank(self, rank: int) -> int | None:
        """The setting of that name; None where convolutions have the rank of all others."""
        return None if self.conv_share == 1 else max(1, round(rank * self.conv_share))


ATTENTION_WAY = Way("attn", ATTENTION)
FULL_WAY = Way("full", f"({ALL_LINEARS}|{ALL_CONVOLUTIONS})")
WAYS = [
    ATTENTION_WAY,
    Way("attn+ff", ALL_LINEARS),
    FULL_WAY,
    Way("full, convolutions at a quarter of the rank", FULL_WAY.pattern, 0.25),
    # Content and style of B-LoRA (Frenkel et al., 2024, section 4.1), which trains both together.
    Way("B-LoRA's two blocks", rf"up_blocks\.0\.attentions\.[01]\..*{ATTENTION}"),
    Way(
        "attn, convolutions of the finest level",
        rf"({ATTENTION}|(down_blocks\.0|up_blocks\.2)\..*{ALL_CONVOLUTIONS})",
    ),
]
LOSER = Way("control: the middle's attention", rf"mid_block\..*{ATTENTION}")
EVERY_WAY = {way.name: way for way in (*WAYS, LOSER)}
