"""The U-Net of a run: loaded, given its adapter, and fitted to the card that is here."""

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel

from lora_utils.config.schema import RunConfig
from lora_utils.config.section import Size
from lora_utils.memory.cards import T4, card_here
from lora_utils.memory.forecast import Forecast, forecast, replan
from lora_utils.memory.gradient_checkpointing import Plan, apply_plan, tighter
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.lean import make_lean
from lora_utils.model.lora import add_lora
from lora_utils.system.device import GIB, Precision


class PlannedUnet:
    """The U-Net with its adapter, and the plan of what its backward pass recomputes."""

    def __init__(
        self, config: RunConfig, shapes: Mapping[Size, int], precision: Precision, device: torch.device
    ):
        """Load the base onto the device, attach the adapter, forecast a step and plan for what is free.

        Args:
            config: Of the run.
            shapes: How many examples there are of each width and height in pixels.
            precision: What the U-Net computes in.
            device: Where it is to be.

        Raises:
            UserError: The base model or the adapter cannot be used.
        """
        self._checkpointing = config.train.gradient_checkpointing
        self.forecast = self._forecast(config, shapes, precision, device)
        self.unet = _load(config, precision.dtype, device)
        self.plan = (
            self.forecast.plan
            if self.forecast
            else Plan(label="full" if self._checkpointing == "full" else "none")
        )
        apply_plan(self.unet, self.plan)

    @property
    def forecast_gib(self) -> float | None:
        """Peak of tensors on the card that is expected of a step; None where nobody forecast it."""
        return round(self.plan.predicted_bytes / GIB, 2) if self.plan.predicted_bytes else None

    def correct(self, measured_gib: float) -> str | None:
        """Plan anew after the first real step, where that was off by more than 3 %; says what changed.

        A plan that was tightened since stays: what did not fit once must not be tried again.
        """
        if self.forecast is None or self._checkpointing != "auto" or self.plan != self.forecast.plan:
            return None
        found, expected_gib = replan(self.forecast, int(measured_gib * GIB)), self.forecast_gib
        if found is None:
            return None
        self._take(found)
        return f"a step took {measured_gib:.2f} GiB, not the {expected_gib} expected: from now on {found}"

    def make_room(self) -> str | None:
        """Recompute one notch more; says what, or None when nothing more may be recomputed."""
        if self.forecast is None or self._checkpointing != "auto":
            return None
        found = tighter(self.plan, self.forecast.prices)
        if found is None:
            return None
        self._take(found)
        return f"from now on {found}"

    def _take(self, plan: Plan) -> None:
        self.plan = plan
        apply_plan(self.unet, plan)

    def _forecast(
        self, config: RunConfig, shapes: Mapping[Size, int], precision: Precision, device: torch.device
    ) -> Forecast | None:
        """On a card, or where a budget is set; a CPU has memory enough to recompute nothing."""
        if device.type != "cuda" and config.train.vram_gib is None:
            return None
        return forecast(
            config, card_here(precision.dtype) if device.type == "cuda" else T4, shapes, precision
        )


def _load(config: RunConfig, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    base = PretrainedSdxl(config.model, config.paths.cache_dir)
    unet = base.load_unet(dtype, device, config.model.base_precision)
    add_lora(unet, config.lora, config.train.seed)
    if config.train.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.train.lean_step:
        make_lean(unet)
    if config.train.torch_compile:
        unet.compile_repeated_blocks()
    return unet.train()
