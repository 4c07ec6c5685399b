"""Settings that will run and most likely are not meant: that learn nothing, or otherwise than they say."""

import math
from collections.abc import Iterator

from lora_utils.config.errors import ConfigError
from lora_utils.config.schema import TIMESTEPS, RunConfig
from lora_utils.config.training import LoraConfig, TrainConfig

# Of the optimisers that want other rates than AdamW's family: from, below, usual.
USUAL_RATES = {"prodigy": (0.1, 10.0, "1"), "schedulefree": (5e-4, 0.1, "1e-3")}
ADAMW_RATES = (1e-7, 0.1, "1e-4")
LEAST_SCALE = 1e-3
"""Of the update, alpha / rank; sd-scripts' alpha of 1 at a rank of 128 is still eight times that."""
LEAST_SNR_GAMMA = 0.01
LEAST_GRAD_NORM = 1e-4
"""Below, the gradients of millions of parameters are smaller than the adam_epsilon beside them."""
MOST_DROPPED = 0.9
MOST_DECAY = 0.1
"""Share of a weight that decay takes away in each step."""
EDGE = math.log(TIMESTEPS)
"""A logit-normal draw beyond it is the first or the last timestep."""


def doubts(config: RunConfig, visits_per_epoch: int | None = None, processes: int = 1) -> list[str]:
    """What is to be thought over before the first step: a sentence each, none for most runs.

    Args:
        config: All settings; they are possible.
        visits_per_epoch: Examples that are learned from, with their repeats; None while they are not counted.
        processes: That train together.

    Raises:
        ConfigError: The learning rate's schedule cannot be drawn over so few steps.
    """
    train = config.train
    sentences = [*_of_rates(train), *_of_the_adapter(config.lora), *_of_the_objective(train)]
    if config.data.caption_dropout_rate >= MOST_DROPPED:
        share = config.data.caption_dropout_rate
        sentences.append(f"caption_dropout_rate {share:g} leaves next to no captions to learn; 0.1 is usual")
    if train.max_train_steps is not None and train.num_train_epochs != _DEFAULT_EPOCHS:
        sentences.append(
            f"max_train_steps {train.max_train_steps} decides, and num_train_epochs {train.num_train_epochs} "
            "has no effect; leave one of them out"
        )

    if visits_per_epoch:
        sentences += _of_a_step(train, visits_per_epoch, processes)
    if visits_per_epoch or train.max_train_steps:
        steps = train.total_steps(visits_per_epoch or 0, processes)
        if problem := train.schedule_problem(steps):
            raise ConfigError(problem)
        sentences += [*_of_the_schedule(train, steps), *_of_short_runs(config, steps)]
    return sentences


_DEFAULT_EPOCHS = TrainConfig.model_fields["num_train_epochs"].default


def _of_rates(train: TrainConfig) -> Iterator[str]:
    rate = train.learning_rate
    name = train.optimizer
    lowest, highest, usual = USUAL_RATES.get(name, ADAMW_RATES)
    if rate == 0:
        yield f"learning_rate is 0: nothing is learned; {usual} is usual"
    elif rate < lowest:
        yield f"optimizer {name} learns next to nothing at learning_rate {rate:g}; {usual} is usual"
    elif rate >= highest:
        yield f"optimizer {name} diverges most likely at learning_rate {rate:g}; {usual} is usual"

    share = rate * train.adam_weight_decay
    if name != "prodigy" and share >= MOST_DECAY:
        yield f"adam_weight_decay {train.adam_weight_decay:g} takes {share:.0%} off the weights in each step"
    if train.max_grad_norm < LEAST_GRAD_NORM:
        yield f"max_grad_norm {train.max_grad_norm:g} leaves next to nothing of the gradients; 1 is usual"


def _of_the_adapter(lora: LoraConfig) -> Iterator[str]:
    alpha = lora.lora_alpha or lora.rank
    divisor = math.sqrt(lora.rank) if lora.use_rslora else lora.rank
    if alpha / divisor < LEAST_SCALE:
        yield (
            f"lora_alpha {alpha:g} at rank {lora.rank} multiplies the update by {alpha / divisor:.1g}, so "
            "that next to nothing is learned; leave lora_alpha out for 1"
        )
    if lora.conv_rank is not None and {"attn", "attn+ff"} >= set(lora.target_modules):
        yield "conv_rank has no effect, because target_modules names no convolution; full has them all"
    if lora.lora_dropout >= MOST_DROPPED:
        yield f"lora_dropout {lora.lora_dropout:g} drops nearly all that the adapter sees; 0.1 is usual"


def _of_the_objective(train: TrainConfig) -> Iterator[str]:
    if train.snr_gamma is not None and train.snr_gamma < LEAST_SNR_GAMMA:
        yield f"snr_gamma {train.snr_gamma:g} weighs every timestep next to nothing; 5 is usual"
    end = train.max_timestep or TIMESTEPS
    if end - train.min_timestep == 1:
        yield f"min_timestep and max_timestep leave one timestep of {TIMESTEPS}, {train.min_timestep}"
    # Nearly all of a normal distribution lies within three deviations.
    nearest = abs(train.logit_mean) - 3 * train.logit_std
    if train.timestep_sampling == "logit_normal" and nearest > EDGE:
        which = "highest" if train.logit_mean > 0 else "lowest"
        yield f"logit_mean {train.logit_mean:g} draws the {which} timestep alone; 0 is usual"


def _of_a_step(train: TrainConfig, visits_per_epoch: int, processes: int) -> Iterator[str]:
    per_step = train.train_batch_size * train.gradient_accumulation_steps * processes
    if per_step > visits_per_epoch:
        together = "train_batch_size and gradient_accumulation_steps"
        yield (
            f"a step makes {per_step} visits and the data has {visits_per_epoch}: each example is seen "
            f"{per_step / visits_per_epoch:.1f} times in every step; lower {together}, or add examples"
        )


def _of_the_schedule(train: TrainConfig, steps: int) -> Iterator[str]:
    warmup = train.lr_warmup_steps
    if warmup >= steps:
        reached = train.learning_rate * (steps - 1) / warmup
        yield (
            f"lr_warmup_steps {warmup} do not end within the {steps} steps of the run: learning_rate reaches "
            f"{reached:.2g} of {train.learning_rate:g}; lower lr_warmup_steps, or train longer"
        )
    elif train.lr_scheduler == "cosine_with_restarts" and train.lr_num_cycles > steps - warmup:
        yield (
            f"lr_num_cycles {train.lr_num_cycles} are more than the {steps - warmup} steps after warm-up: "
            "learning_rate never falls; lower lr_num_cycles"
        )


def _of_short_runs(config: RunConfig, steps: int) -> Iterator[str]:
    every = config.train.validation_steps
    if config.data.validation_split and every > steps:
        yield (
            f"the run's {steps} steps end before validation_steps {every}: held-out loss is measured at the "
            "start and at the end alone"
        )
    every = config.checkpoint.checkpointing_steps
    if every > steps:
        minutes = config.checkpoint.checkpointing_minutes
        unless = f", unless {minutes:g} minutes are over before" if minutes else ""
        yield (
            f"the run's {steps} steps end before checkpointing_steps {every}: the first checkpoint is that "
            f"at the end{unless}"
        )
