"""``python -m lora_utils STAGE``: every setting of the schema is a flag. ``--help`` loads no torch."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from lora_utils import UserError, __version__
from lora_utils.config.loading import all_settings, find_config, load_config, presets
from lora_utils.config.schema import RunConfig
from lora_utils.system.redaction import install, redacted

STAGES = {
    "check": "what this machine is, and what a run on it will use; downloads nothing",
    "precompute": "encode images and captions once",
    "train": "train a LoRA (encodes first what is missing)",
    "compare": "draw prompts with the base model and with the LoRA on equal seeds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, 2 for something the user can put right, 130 when interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    install()
    try:
        stage, config = parse(sys.argv[1:] if arguments is None else arguments)
        name, _, card = stage.partition(" --card ")
        if card:
            _check(config, card)
        else:
            _RUNNERS[name](config)
        sys.stdout.flush()
    except UserError as error:
        print(redacted(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a folder that cannot be written, a full disk
        print(redacted(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "stopped; what was finished is kept (resume_from_checkpoint=latest goes on from it)",
            file=sys.stderr,
        )
        return 130
    return 0


def parse(arguments: Sequence[str]) -> tuple[str, RunConfig]:
    """Stage, one of _RUNNERS or "check --card NAME", and config from the command line.

    Raises:
        ConfigError: A flag is unknown or its value impossible.
    """
    parser = _build_parser()
    known, unknown = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    overrides = {
        name: value for name, value in vars(known).items() if name in all_settings() and value is not None
    }
    stray = {
        argument.removeprefix("--").split("=")[0]: None for argument in unknown if argument.startswith("--")
    }
    if unknown and not stray:
        parser.error(f"cannot understand {' '.join(unknown)}")
    if (known.data or known.card) and known.stage != "check":
        parser.error("--data and --card belong to check")
    stage = f"check --card {known.card}" if known.card else "check --data" if known.data else known.stage
    return stage, load_config(known.config, overrides | stray)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))  # it quotes arguments


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lora_utils",
        usage="python -m lora_utils STAGE [--config FILE] [--SETTING VALUE ...]",
        description="Fine-tune SDXL with LoRA on a small GPU.",
        epilog="stages:\n" + "\n".join(f"  {stage:12}{purpose}" for stage, purpose in STAGES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stage", choices=STAGES, metavar="{" + ",".join(STAGES) + "}")
    told = f"YAML file of settings, or a preset: {', '.join(presets())}; flags win over it"
    parser.add_argument("--config", type=find_config, metavar="FILE", help=told)
    parser.add_argument(
        "--data", action="store_true", help="with check: decode every image, read every caption"
    )
    parser.add_argument(
        "--card", metavar="NAME", help="with check: forecast for t4, l4, a100, 8gb … instead of here"
    )
    parser.add_argument("--version", action="version", version=__version__)
    groups = {
        name: parser.add_argument_group(name, str(field.annotation.__doc__))
        for name, field in _sections().items()
    }
    for leaf, (section, field) in all_settings().items():
        groups[section].add_argument(f"--{leaf}", help=_help(field), metavar=_metavar(field), **_arity(field))
    return parser


def _sections() -> dict[str, FieldInfo]:
    return RunConfig.model_fields


def _arity(field: FieldInfo) -> dict[str, Any]:
    if {get_origin(part) for part in _parts(field.annotation)} & {list, tuple}:
        return {"nargs": "+"}
    switch = field.annotation is bool or (field.default == "auto" and "full" in get_args(field.annotation))
    return {"nargs": "?", "const": "true"} if switch else {}


def _metavar(field: FieldInfo) -> str:
    parts = list(_parts(field.annotation))
    if choices := [str(part) for part in parts if isinstance(part, str | int) and not isinstance(part, bool)]:
        return "{" + ",".join(choices) + "}"
    return next(part.__name__.upper() for part in parts if part in (int, float, bool, str, Path))


def _parts(annotation: Any) -> Iterator[Any]:
    """What a type is made of: PositiveInt | None has int in it, a Literal its strings."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _help(field: FieldInfo) -> str:
    default = " ".join(map(str, field.default)) if isinstance(field.default, list | tuple) else field.default
    text = f"{field.description} (default: {default})" if default is not None else str(field.description)
    return text.replace("%", "%%")


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (
        name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument
    )


def _check(config: RunConfig, card: str | None = None) -> None:
    from lora_utils import stages

    print(stages.check(config, card))


def _check_data(config: RunConfig) -> None:
    from lora_utils import stages

    print(stages.check_data(config))


def _precompute(config: RunConfig) -> None:
    from lora_utils import stages

    print(stages.precompute(config))


def _train(config: RunConfig) -> None:
    from lora_utils import stages

    for _ in stages.train(config):
        pass
    print(f"the LoRA is in {config.paths.output_dir}/pytorch_lora_weights.safetensors")


def _compare(config: RunConfig) -> None:
    from lora_utils import stages

    result = stages.compare(config)
    print(f"{len(result.shots)} pairs, side by side in {result.folder}/sheet.png")


_RUNNERS: dict[str, Callable[[RunConfig], None]] = {
    "check": _check,
    "check --data": _check_data,
    "precompute": _precompute,
    "train": _train,
    "compare": _compare,
}
