"""The settings of checkpoints: when they are made, where they go, and how a run goes on from them."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)

from lora_utils.config.section import (
    LARGEST_COUNT,
    Fraction,
    Location,
    NameOrPath,
    NonNegativeInt,
    PositiveInt,
    Section,
    Seed,
    Texts,
)


class CheckpointConfig(Section):
    """When a run keeps what it has learned, and how it goes on."""

    checkpointing_steps: PositiveInt = 500
    """Steps between checkpoints; there is always one at the end."""
    checkpointing_minutes: PositiveFloat | None = 10.0
    """Minutes between checkpoints, where that comes first."""
    checkpoints_total_limit: Annotated[int, Field(ge=2, le=LARGEST_COUNT)] = 2
    """Newest checkpoints that are kept; at least two, in case the disk damages one."""
    resume_from_checkpoint: NameOrPath = "none"
    """latest goes on from the run folder's newest sound checkpoint, if there is one; or a folder; or none."""
    resume_force: bool = False
    """Go on from a checkpoint although settings differ that make it another run; takes over what fits."""
    max_train_minutes: PositiveFloat | None = None
    """Stop with a checkpoint after so long, before the machine is taken away; the same command goes on."""
    mirror_dir: Location | None = None
    """Folder, such as one on Google Drive, for verified copies of checkpoints; latest restores from it."""


POLYNOMIAL_END = 1e-7  # where diffusers' polynomial ends
LARGEST_RANK = 4096  # no matrix of SDXL's has a rank above 1280
Optimizer = Literal[
    "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "adafactor", "prodigy", "schedulefree"
]


def _from_flag(value: Any) -> Any:
    """The words that diffusers' bare flag --gradient_checkpointing stands for."""
    # Command lines say true, YAML gives a bool; both mean what the flag of diffusers' scripts does.
    words = {"true": "full", "yes": "full", "on": "full", "false": "none", "no": "none", "off": "none"}
    return words.get(str(value).lower(), value) if isinstance(value, bool | str) else value


def _not_blank(names: list[str]) -> list[str]:
    # An empty name would match every layer.
    if not all(name.strip() for name in names):
        raise ValueError("holds an empty name")
    return names


Checkpointing = Annotated[Literal["auto", "none", "full"], BeforeValidator(_from_flag)]


class LoraConfig(Section):
    """Size and reach of the low-rank update (Hu et al., 2021)."""

    rank: Annotated[int, Field(gt=0, le=LARGEST_RANK)] = 16
    """Rank r of each update. Trainable parameters grow linearly with it."""
    conv_rank: Annotated[int, Field(gt=0, le=LARGEST_RANK)] | None = None
    """Rank of the convolutions' updates; rank when not given. Their scale is that of all others."""
    lora_alpha: PositiveFloat | None = None
    """The update is multiplied by lora_alpha / rank; equal to rank when not given."""
    lora_dropout: Fraction = 0.0
    """Share of a LoRA layer's inputs that is dropped during training."""
    target_modules: Annotated[Texts, AfterValidator(_not_blank)] = ["full"]
    """Layers with an update: full (SDXL's 722 linears and 49 convolutions), attn+ff (all linears), attn (the
    560 of attention), or names.
    """
    use_rslora: bool = False
    """Scale updates by lora_alpha / sqrt(rank) (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Split weights into magnitude and direction (Liu et al., 2024); slower, by peft's own forward."""


class TrainConfig(Section):
    """The training loop. A step is one optimiser update, a micro-batch one backward pass."""

    seed: Seed = 0
    """Decides initial weights, data order, noise and timesteps: equal seeds give equal weights."""
    max_train_steps: PositiveInt | None = None
    """Optimiser updates in all; overrides num_train_epochs."""
    num_train_epochs: PositiveInt = 100
    """Passes over the data."""
    train_batch_size: PositiveInt = 1
    """Examples in a micro-batch, per process."""
    gradient_accumulation_steps: PositiveInt = 4
    """Micro-batches in a step."""
    learning_rate: NonNegativeFloat = 1e-4
    """Peak learning rate, after warm-up."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "constant"
    """Shape of the learning rate after warm-up, over max_train_steps."""
    lr_warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    lr_num_cycles: PositiveInt = 1
    """Restarts of cosine_with_restarts."""
    lr_power: PositiveFloat = 1.0
    """Power of polynomial."""
    optimizer: Optimizer = "adamw"
    """How weights follow gradients; prodigy wants learning_rate 1, schedulefree about 1e-3. The paged ones
    move states of 100,000 numbers and more to host memory while the card is full: on SDXL those of the
    widest linears from rank 10 on, and most of attention's only from rank 79 on."""
    use_8bit_adam: bool = False
    """The same as optimizer adamw8bit: AdamW from bitsandbytes with 8-bit states."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (Hayou et al., 2024): learning rate of B over that of A; 16 in the paper."""
    use_ema: bool = False
    """Save, and measure held-out loss on, an exponential moving average of the adapter."""
    ema_decay: Fraction = 0.999
    """Of the average, once it is warm; it starts as (1 + step) / (10 + step)."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of the second moment."""
    adam_weight_decay: NonNegativeFloat = 1e-2
    """Decoupled weight decay (Loshchilov & Hutter, 2019)."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    snr_gamma: PositiveFloat | None = None
    """Min-SNR weighting (Hang et al., 2023); 5 in the paper. Plain mean squared error when not given."""
    debiased_estimation_loss: bool = False
    """Weigh the loss by 1 / sqrt(SNR) (Yu et al., 2023)."""
    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Error of each latent; huber and smooth_l1 forgive outliers."""
    huber_c: PositiveFloat = 0.1
    """Where huber and smooth_l1 turn from square to linear."""
    noise_offset: NonNegativeFloat = 0.0
    """Strength of noise that is equal all over a channel (Guttenberg, 2023): for dark and bright pictures."""
    input_perturbation: NonNegativeFloat = 0.0
    """Strength of extra noise on the input alone (Ning et al., 2023); 0.1 in the paper."""
    rescale_betas_zero_snr: bool = False
    """Train on a schedule that ends in pure noise (Lin et al., 2024); for bases that predict v."""
    min_timestep: NonNegativeInt = 0
    """Lowest timestep that is drawn."""
    max_timestep: PositiveInt | None = None
    """Timesteps are drawn below this; the schedule's length when not given."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are drawn between those two."""
    logit_mean: float = 0.0
    """Of logit_normal: above 0 leans towards noise."""
    logit_std: PositiveFloat = 1.0
    """Of logit_normal."""
    gradient_checkpointing: Checkpointing = "auto"
    """Recompute activations in the backward pass: auto what does not fit, none never, full always."""
    vram_gib: PositiveFloat | None = None
    """GPU memory that auto plans for; what the card has free when not given."""
    lean_step: bool = True
    """Base and LoRA as one node, no autocast: less memory and time, same gradients; false is peft's way."""
    channels_last: bool = False
    """Keep convolutions' tensors as NHWC, with lean_step false; faster on some cards."""
    deterministic: bool = False
    """Equal seeds give equal bytes on a GPU too, as they do on a CPU: torch's deterministic algorithms, which
    are slower.
    """
    torch_compile: bool = False
    """Compile the repeated blocks, with lean_step false; needs minutes at the start and a card from sm_80."""
    max_skipped_steps: PositiveInt = 20
    """Steps in a row without a finite loss and gradient, after which the run stops."""
    validation_steps: PositiveInt = 100
    """Steps between measurements of the held-out loss."""

    @model_validator(mode="after")
    def _must_agree(self) -> Self:
        # Two names for one choice: which of them wins must not be guessed.
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(
                f"use_8bit_adam and optimizer {self.optimizer} exclude each other; leave one out"
            )
        # Both weigh timesteps against the same imbalance; together they would undo it twice.
        if self.snr_gamma is not None and self.debiased_estimation_loss:
            raise ValueError("snr_gamma and debiased_estimation_loss exclude each other; leave one out")
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(
                f"max_timestep {self.max_timestep} must be above min_timestep {self.min_timestep}"
            )
        # Dynamo breaks the graph at the lean nodes' in-place products, and compiles each block anew.
        if self.torch_compile and self.lean_step:
            raise ValueError("torch_compile compiles peft's way: set lean_step to false too")
        # The lean norms and convolutions copy such tensors back and forth.
        if self.channels_last and self.lean_step:
            raise ValueError("channels_last is for peft's way: set lean_step to false too")
        if self.optimizer == "schedulefree" and self.use_ema:
            raise ValueError("optimizer schedulefree averages the weights by itself; leave out use_ema")
        # Its average divides by beta1.
        if self.optimizer == "schedulefree" and self.adam_beta1 == 0:
            raise ValueError("optimizer schedulefree needs an adam_beta1 above 0; 0.9 is the usual one")
        if self.optimizer == "prodigy" and (self.loraplus_lr_ratio is not None or self.learning_rate == 0):
            raise ValueError(
                "optimizer prodigy finds one learning rate for all: no loraplus_lr_ratio, learning_rate 1"
            )
        if self.optimizer == "schedulefree" and self.lr_scheduler not in ("constant", "constant_with_warmup"):
            raise ValueError("optimizer schedulefree makes its own schedule; set lr_scheduler to constant")
        return self

    @model_validator(mode="after")
    def _schedule_can_be_drawn(self) -> Self:
        # Where epochs decide, the steps are known once the data is counted.
        if self.max_train_steps is not None and (problem := self.schedule_problem(self.max_train_steps)):
            raise ValueError(problem)
        return self

    def schedule_problem(self, steps: int) -> str | None:
        """Why the learning rate cannot be drawn over so many steps; None where it can."""
        if self.lr_scheduler != "polynomial":
            return None
        if self.learning_rate > POLYNOMIAL_END and self.lr_warmup_steps < steps:
            return None
        return (
            f"lr_scheduler polynomial needs a learning_rate above {POLYNOMIAL_END} and lr_warmup_steps below "
            f"the {steps} steps of the run; change them, or set lr_scheduler=linear"
        )

    def total_steps(self, visits_per_epoch: int, processes: int = 1) -> int:
        """Optimiser updates in all: max_train_steps, or enough for num_train_epochs."""
        # Visits of one optimiser update, over all processes.
        per_step = self.train_batch_size * self.gradient_accumulation_steps * processes
        return self.max_train_steps or math.ceil(self.num_train_epochs * visits_per_epoch / per_step)
