"""Optimisers and schedules of the learning rate by name, from the libraries that keep them.

A name has a size in ``memory.unet_footprint.state_bytes`` too, by which a step is forecast.
"""

import importlib
import logging
import warnings
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lora_utils import UserError
from lora_utils.config.training import TrainConfig
from lora_utils.memory.unet_footprint import PAGED_FROM, state_bytes
from lora_utils.system.units import GIB

LOGGER = logging.getLogger(__name__)
BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}
# Of a parameter group, what is a setting; the rest of it may be states.
GROUP_OPTIONS = (
    "lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize",
    "foreach", "fused", "capturable", "differentiable",
)  # fmt: skip
SAME_SHAPE = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""States in their parameter's shape, that kernels write to."""
PAGED = ("state1", "state2")
"""Those of them that bitsandbytes pages."""
QUANTISED_BLOCK = 256  # bitsandbytes: numbers that share a scale
QUANTISED_LEVELS = 256  # what 8 bits can stand for


class OptimizerError(UserError):
    """An optimiser is not installed, or cannot do what the other settings ask for."""


def new_optimizer(unet: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimiser of the U-Net's trainable parameters, in training mode.

    bitsandbytes' optimisers are tried by a real step on the parameters' device first; where that fails, AdamW
    with 32-bit states takes their place, and a warning says what is lost.

    Raises:
        OptimizerError: It is not installed.
    """
    name = "adamw8bit" if config.use_8bit_adam else config.optimizer
    groups = _parameter_groups(unet, config)
    name = _usable(name, [parameter for group in groups for parameter in group["params"]])
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if name == "adafactor":
        # The learning rate as it is, not relative to the weights: B starts from 0, and would hardly move.
        adafactor = _imported("transformers.optimization", "Adafactor")
        return adafactor(groups, lr=config.learning_rate, relative_step=False, scale_parameter=False)
    if name == "prodigy":  # with the corrections that diffusers' scripts turn on
        prodigy = _imported("prodigyopt", "Prodigy")
        return prodigy(groups, use_bias_correction=True, safeguard_warmup=True, **settings)
    if name == "schedulefree":
        optimizer = _imported("schedulefree", "AdamWScheduleFree")(groups, **settings)
        optimizer.train()
        return optimizer
    return _imported("bitsandbytes.optim", BITSANDBYTES[name])(groups, **settings)


def new_lr_scheduler(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """The schedule as diffusers draws it; its ``step`` is to be called once per update of the weights.

    It must not be prepared: accelerate would step it once per process. The rates of LoRA+ keep their ratio.

    Raises:
        OptimizerError: The schedule cannot be drawn with these settings.
    """
    name = config.lr_scheduler
    if problem := config.schedule_problem(steps):
        raise OptimizerError(problem)
    if name == "constant" and config.lr_warmup_steps:
        name = "constant_with_warmup"  # diffusers' plain "constant" ignores warm-up without a word
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def load_states(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Take an optimiser's states from a ``state_dict`` of its class; its settings stay what they are.

    Raises:
        ValueError: They are of other parameters. A kernel would write beyond a state that is too small.
    """
    settings = [
        {name: group[name] for name in GROUP_OPTIONS if name in group} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and not _fits(name, value, parameter):
                    raise ValueError(f"the optimiser's {name} has the shape {tuple(value.shape)}")
    if getattr(optimizer, "is_paged", False):
        _page_again(optimizer)


def _page_again(optimizer: Any) -> None:
    """Put loaded states where bitsandbytes pages from: as plain tensors they would stay on the card."""
    for parameter, states in optimizer.state.items():
        for name in PAGED:
            if name in states:
                paged = optimizer.get_state_buffer(parameter, dtype=states[name].dtype)
                paged.copy_(states[name])
                states[name] = paged


def _fits(name: str, value: torch.Tensor, parameter: torch.Tensor) -> bool:
    if name in SAME_SHAPE:
        return value.shape == parameter.shape
    if name == "step":
        return value.ndim == 0
    if name.startswith("absmax"):
        return value.numel() == -(-parameter.numel() // QUANTISED_BLOCK)
    return value.numel() == QUANTISED_LEVELS if name.startswith("qmap") else True


def go_to_step(scheduler: LRScheduler, step: int) -> None:
    """Put a new schedule where it is after so many steps: it is a function of their count alone."""
    scheduler.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()


def _parameter_groups(unet: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """One group, or with LoRA+ B apart (Hayou et al., 2024, section 5); DoRA's magnitudes go with A."""
    trainable = [(name, parameter) for name, parameter in unet.named_parameters() if parameter.requires_grad]
    # Decay is the groups': given to Prodigy itself, it would print a line.
    common = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    if config.loraplus_lr_ratio is None:
        return [{"params": [parameter for _, parameter in trainable], **common}]

    ups = [parameter for name, parameter in trainable if ".lora_B." in name]
    others = [parameter for name, parameter in trainable if ".lora_B." not in name]
    faster = common | {"lr": config.learning_rate * config.loraplus_lr_ratio}
    return [{"params": others, **common}, {"params": ups, **faster}]


def _usable(name: str, parameters: list[nn.Parameter]) -> str:
    """The optimiser that works on the parameters' device: the wanted one, or what takes its place."""
    device = parameters[0].device
    if name.startswith("paged_") and device.type == "cpu":
        LOGGER.warning(
            "optimizer %s pages states from a GPU to RAM; without a GPU it is the same without paging", name
        )
        name = name.removeprefix("paged_")
    if name not in BITSANDBYTES:
        return name
    reason = _failure(name, device)
    if reason is None:
        return name

    shapes = [parameter.shape for parameter in parameters]
    more_gib = (state_bytes("adamw", shapes) - state_bytes(name, shapes)) / GIB
    LOGGER.warning(
        "optimizer %s does not work on %s (%s); adamw with 32-bit states takes its place: %.2f GiB more%s",
        name,
        device,
        reason,
        more_gib,
        ", and nothing is paged" if name.startswith("paged_") else "",
    )
    return "adamw"


def _failure(name: str, device: torch.device) -> str | None:
    """Why a real step of a bitsandbytes optimiser on the device failed; None when it did not."""
    parameter = nn.Parameter(torch.ones(PAGED_FROM, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        getattr(importlib.import_module("bitsandbytes.optim"), BITSANDBYTES[name])([parameter], lr=0.1).step()
        moved = bool(((parameter > 0.8) & (parameter < 1)).all())
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # In this order: there is no package, no such optimiser in it, no CUDA library, no kernel for the
        # card.
        return " ".join(str(error).split())[:200]
    return None if moved else "its step does not move the weights"


def _imported(module: str, name: str) -> Any:
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise OptimizerError(
            f"this optimizer needs {package}: pip install {package}, or set optimizer=adamw"
        ) from error
