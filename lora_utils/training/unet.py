"""The U-Net of a run: loaded, given its adapter, and planned for the card that is here."""

import logging

import torch
from diffusers import UNet2DConditionModel

from lora_utils.config.training import LoraConfig, TrainConfig
from lora_utils.memory.forecast import Forecast, replan
from lora_utils.memory.gradient_checkpointing import Plan, apply_plan, tighter
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.lean import make_lean
from lora_utils.model.lora import add_lora
from lora_utils.model.quantisation import left_in_full
from lora_utils.system.device import Precision
from lora_utils.system.units import GIB

LOGGER = logging.getLogger(__name__)


class PlannedUnet:
    """The U-Net with its adapter, and the plan of what its backward pass recomputes."""

    def __init__(
        self,
        base: PretrainedSdxl,
        lora: LoraConfig,
        config: TrainConfig,
        precision: Precision,
        device: torch.device,
        forecast: Forecast | None,
    ) -> None:
        """Load the base onto the device, attach the adapter, and recompute what the forecast says.

        Args:
            base: Where the weights come from.
            lora: The adapter.
            config: How the step computes, and the seed of the adapter.
            precision: What the U-Net computes in.
            device: Where it is to be.
            forecast: Of a step on this device; None where nobody forecast it.

        Raises:
            UserError: The base model or the adapter cannot be used.
        """
        self.forecast = forecast
        self._may_replan = forecast is not None and config.gradient_checkpointing == "auto"
        self.unet = base.load_unet(precision.dtype, device, base.base_precision)
        self.left_in_full = left_in_full(self.unet, base.base_precision)
        if self.left_in_full:
            LOGGER.warning("base_precision: %s", self.left_in_full)
        _adapt(self.unet, lora, config)
        if forecast is not None:
            self.plan = forecast.plan
        elif config.gradient_checkpointing == "auto" and device.type == "cuda":
            self.plan = Plan(
                label="full"
            )  # nobody can say what fits: slower, but it runs where anything does
        else:
            self.plan = Plan(label="full" if config.gradient_checkpointing == "full" else "none")
        apply_plan(self.unet, self.plan)

    @property
    def forecast_gib(self) -> float | None:
        """Peak of tensors on the card that is expected of a step; None where nobody forecast it."""
        return round(self.plan.predicted_bytes / GIB, 2) if self.plan.predicted_bytes else None

    def correct(self, measured_gib: float) -> str | None:
        """Plan anew after the first whole step, where that was off by more than 3 %; says what changed.

        A plan that was tightened since stays: what did not fit once must not be tried again.
        """
        # Nobody planned, the user decided, or a step did not fit meanwhile.
        if self.forecast is None or not self._may_replan or self.plan != self.forecast.plan:
            return None
        expected_gib = self.forecast_gib
        plan = replan(self.forecast, int(measured_gib * GIB))
        if plan is None:
            return None
        self._take(plan)
        return f"a step took {measured_gib:.2f} GiB, not the {expected_gib} expected: from now on {plan}"

    def make_room(self) -> str | None:
        """Recompute one notch more; says what, or None when nothing more may be recomputed."""
        if self.forecast is None or not self._may_replan:
            return None
        plan = tighter(self.plan, self.forecast.prices)
        if plan is None:
            return None
        self._take(plan)
        return f"from now on {plan}"

    def _take(self, plan: Plan) -> None:
        self.plan = plan
        apply_plan(self.unet, plan)


def _adapt(unet: UNet2DConditionModel, lora: LoraConfig, config: TrainConfig) -> None:
    # Before the adapter: of its convolutions, files and 8-bit states hold numbers without their layout.
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    add_lora(unet, lora, config.seed)
    # Last but for compiling: the lean step's stacked copies must have the layout and device of what they
    # copy.
    if config.lean_step:
        make_lean(unet)
    if config.torch_compile:
        unet.compile_repeated_blocks()
    unet.train()
