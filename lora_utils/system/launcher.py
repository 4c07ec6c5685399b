"""What ``accelerate launch`` asks for by its environment, and where a run does otherwise.

Number and kind of processes are obeyed, and its precision where the settings leave it open.
"""

import os

from lora_utils import UserError

PRECISION = "ACCELERATE_MIXED_PRECISION"
AFTERWORD = (
    "(a traceback below this line is of accelerate's launcher; accelerate launch --quiet leaves it out)"
)
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


class LaunchError(UserError):
    """accelerate launch asks for what a run cannot do."""


def launched_precision() -> str | None:
    """no, fp16, bf16 or fp8, as ``accelerate launch --mixed_precision`` says; None without a launcher."""
    return os.environ.get(PRECISION)


def launched_processes() -> int:
    """How many processes accelerate launch, or torchrun, started."""
    return _number("WORLD_SIZE", 1)


def is_first_process() -> bool:
    """Whether this is the first of them, or the only one."""
    return _number("RANK", 0) == 0


def refuse_impossible(has_gpu: bool) -> None:
    """Nothing, but where the launcher asks for what no setting could make of a run.

    Args:
        has_gpu: Whether torch sees a GPU.

    Raises:
        LaunchError: The base would be spread over cards, though a LoRA of SDXL fits each and its checkpoints
            are of one piece; or a GPU is there and not to be used.
    """
    for variable, name in SHARDING.items():
        if _is_on(variable):
            raise LaunchError(
                f"accelerate launch asks for {name}, which is not used here: every process holds the whole "
                "model; start without that option, or mend 'accelerate config'"
            )
    # Precision, encoders and forecast go by the GPU that torch sees.
    if has_gpu and _is_on("ACCELERATE_USE_CPU"):
        raise LaunchError(
            "accelerate launch --cpu does not hide the GPU; start with CUDA_VISIBLE_DEVICES= instead"
        )


def contradictions(precision: str, gradient_accumulation_steps: int, torch_compile: bool) -> list[str]:
    """Where a run does otherwise than ``accelerate launch`` says, a sentence each; none without a launcher.

    Args:
        precision: What the U-Net computes in.
        gradient_accumulation_steps: The setting.
        torch_compile: The setting.
    """
    told = []
    wanted = (launched_precision() or precision).lower()
    if {"no": "fp32"}.get(wanted, wanted) != precision:
        told.append(f"mixed_precision {wanted}, and {precision} is used; set mixed_precision for another")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if accumulation.isdecimal() and int(accumulation) != gradient_accumulation_steps:
        told.append(
            f"gradient_accumulation_steps {accumulation}, and the setting's {gradient_accumulation_steps} "
            "are made"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        does = "compiles by itself" if torch_compile else "does not compile"
        told.append(f"dynamo_backend {backend}, and the run {does}, as torch_compile says")
    return [f"accelerate launch says {sentence}" for sentence in told]


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, "").strip()
    return int(text) if text.isdecimal() else otherwise


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "y", "on", "t")
