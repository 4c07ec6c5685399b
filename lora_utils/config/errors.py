"""What is wrong with settings, said by their names."""

from typing import Any

from lora_utils import UserError
from lora_utils.config.strict_yaml import one_line
from lora_utils.system.redaction import redacted

MOST_PROBLEMS = 3
"""That one message tells; the others are counted."""
_PRECISION_WORDS = {
    **dict.fromkeys(("false", "no", "none", "float32", "float", "full", "32"), "; full precision is fp32"),
    **dict.fromkeys(("float16", "half", "16"), "; half precision is fp16"),
    "bfloat16": "; it is written bf16",
}
_ZERO_MEANS = {
    "lora_alpha": "; leave it out for the same as rank",
    "max_grad_norm": "; 1e9 never scales down",
    "snr_gamma": "; leave it out, or set none, for no weighting",
}


class ConfigError(UserError):
    """A setting is unknown or impossible; one line, or one for each name, without secrets."""

    def __init__(self, *lines: str) -> None:
        """Take lines that may quote what the user wrote."""
        super().__init__("\n".join(one_line(redacted(line)) for line in lines))


def explained(problems: list[Any]) -> ConfigError:
    """The first few of what pydantic found, on one line.

    Args:
        problems: From ``ValidationError.errors``.
    """
    more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
    return ConfigError("; ".join(dict.fromkeys(map(_explain, problems[:MOST_PROBLEMS]))) + more)


def _explain(problem: Any) -> str:
    message = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    # A validator of a whole section: its message names the settings by itself.
    if len(problem["loc"]) < 2:  # settings that do not fit together
        return message
    leaf = problem["loc"][1]
    return f"{leaf}: {message}, not {one_line(repr(problem['input']), 60)}{_hint(leaf, problem)}"


def _hint(leaf: str, problem: Any) -> str:
    """What to write instead, where habits of other programs are behind a value."""
    value = problem["input"]
    if problem["type"] in ("string_type", "path_type") and isinstance(value, int | float):
        return "; put it in quotes"
    if leaf == "mixed_precision":
        return _PRECISION_WORDS.get(str(value).lower(), "")
    if leaf == "lr_warmup_steps" and problem["type"].startswith("int_"):
        return "; it counts steps, and is no share of the run"
    return _ZERO_MEANS.get(leaf, "") if str(value) in ("0", "0.0") else ""
