"""``lora-utils STAGE``, ``python -m lora_utils STAGE``: every setting is a flag. --help loads no torch."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, get_origin

from pydantic.fields import FieldInfo

from lora_utils import UserError, __version__
from lora_utils.config.flags import read_flags
from lora_utils.config.loading import dump_config, find_config, load_config, presets
from lora_utils.config.reference import choices_of, parts_of, range_of, settings_of
from lora_utils.config.schema import RunConfig, all_settings, describe
from lora_utils.system.collector import collector_paused
from lora_utils.system.console import accept_any_text
from lora_utils.system.launcher import AFTERWORD, is_first_process, launched_precision, launched_processes
from lora_utils.system.redaction import install, redacted
from lora_utils.system.signals import interrupt_when_told_to_end
from lora_utils.system.steps import Steps

KEPT = "what was finished is kept (resume_from_checkpoint=latest goes on from it)"


@dataclass(frozen=True)
class Command:
    """One call of the command line, understood."""

    stage: str
    """A key of STAGES."""
    config: RunConfig
    card: str | None = None
    """With check: forecast for this card instead of the one that is here."""
    data: bool = False
    """With check: decode every image, read every caption."""
    verbose: bool = False
    """With check: every setting as it will be used."""


class Stage(NamedTuple):
    """A row of STAGES."""

    purpose: str
    run: Callable[[Command], int]
    """Returns the exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit code.

    0, 1 where a check has failed, 2 for what the user can put right, 130 when interrupted.
    """
    accept_any_text()
    interrupt_when_told_to_end()
    install()
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        code = _run(command)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        print(redacted(f"{type(error).__name__}: {error}"), file=sys.stderr)
        if launched_precision() is not None:
            print(AFTERWORD, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # who was interrupted may know more
        print(redacted(f"stopped; {stop or KEPT}"), file=sys.stderr)
        return 130
    return 0


def _run(command: Command) -> int:
    """The stage; in one process alone, where several could only do the same work and write the same files."""
    count = launched_processes()
    if command.stage != "train" and count > 1:
        if not is_first_process():
            return 0
        print(f"accelerate launch says {count} processes, and {command.stage} uses one", file=sys.stderr)
    return STAGES[command.stage].run(command)


def parse(arguments: Sequence[str]) -> Command:
    """Stage and config from the command line; exits with 2 and a message where there is no stage.

    Raises:
        ConfigError: A flag is unknown or its value impossible.
    """
    given, others = read_flags(arguments)
    stage = next((word for word in others if word in STAGES), None)
    parser = _build_parser(stage, shows_all="--help-all" in others)
    known, unknown = parser.parse_known_args([_with_underscores(argument) for argument in others])
    # Unknown flags go to load_config too, which says what may have been meant.
    stray = {word.removeprefix("--").split("=")[0]: "" for word in unknown if word.startswith("--")}
    if unknown and not stray:
        parser.error(f"cannot understand {' '.join(unknown)}")
    if sum(word.split("=")[0] == "--config" for word in others) > 1:
        parser.error("--config is there twice; a file may hold what both do")
    # They would be without effect.
    if (known.data or known.card or known.verbose) and known.stage != "check":
        parser.error(f"{', '.join(CHECKS)} belong to check")
    config = load_config(known.config, given | stray)
    return Command(known.stage, config, known.card, known.data, known.verbose)


# Each imports the stages, and with them torch, only when it runs: --help must not wait for seconds.


def _check(command: Command) -> int:
    from lora_utils import checking

    if command.data:
        print(checking.check_data(command.config))
        return 0
    lines = Steps(checking.checking(command.config, command.card))
    for line in lines:
        print(line, flush=True)
    report = lines.result
    if command.verbose:
        print(f"\n{report.config or dump_config(command.config)}")
    return int(report.has_failed)


def _precompute(command: Command) -> int:
    print(_stages().precompute(command.config))
    return 0


def _train(command: Command) -> int:
    from lora_utils.storage.log import WEIGHTS_NAME
    from lora_utils.training.folders import completed_run, find_run

    if folder := completed_run(command.config):  # within a moment: without what training imports
        if is_first_process():
            print(f"{folder} is complete; its LoRA is in {folder / WEIGHTS_NAME}")
        return 0
    for _ in _stages().train(command.config):
        pass
    if not is_first_process():  # the others may look before it is written
        return 0
    folder = find_run(command.config)
    print(f"the LoRA is in {folder / WEIGHTS_NAME}; draw with it: compare --lora_path {folder}")
    return 0


def _compare(command: Command) -> int:
    try:
        comparison = _stages().compare(command.config)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or "no picture was written") from None
    print(f"{len(comparison.shots)} pairs, side by side in {comparison.folder}/sheet.png")
    return 0


def _stages() -> ModuleType:
    with collector_paused():
        from lora_utils import stages
    return stages


STAGES = {
    "check": Stage("what this machine is, and what a run on it will use; downloads nothing", _check),
    "precompute": Stage("encode images and captions once", _precompute),
    "train": Stage("train a LoRA (encodes first what is missing)", _train),
    "compare": Stage("draw prompts with the base model and with the LoRA on equal seeds", _compare),
}


CHECKS: dict[str, dict[str, Any]] = {
    "--data": {"action": "store_true", "help": "with check: decode every image, read every caption"},
    "--card": {"metavar": "NAME", "help": "with check: forecast for t4, l4, a100, 8gb … instead of here"},
    "--verbose": {"action": "store_true", "help": "with check: every setting as it will be used"},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))  # it quotes arguments, and one may be a token


def _build_parser(stage: str | None, shows_all: bool) -> argparse.ArgumentParser:
    """What explains the command line, and reads all of it but the settings.

    Args:
        stage: Whose settings the help shows.
        shows_all: The help shows all settings; so it does without a stage.
    """
    parser = _Parser(
        prog="python -m lora_utils",
        usage=f"python -m lora_utils {stage or 'STAGE'} [--config FILE] [--SETTING VALUE ...]",
        description=STAGES[stage].purpose if stage else "Fine-tune SDXL with LoRA on a small GPU.",
        epilog="stages:\n" + "\n".join(f"  {name:12}{stage.purpose}" for name, stage in STAGES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what is short for one setting today would be ambiguous with the next one
        add_help=False,
    )
    parser.add_argument("stage", choices=STAGES, metavar="{" + ",".join(STAGES) + "}")
    files = f"YAML file of settings, or a preset: {', '.join(presets())}; flags win over it"
    parser.add_argument("--config", type=find_config, metavar="FILE", help=files)
    for name, options in CHECKS.items():
        shown: dict[str, Any] = {} if stage in (None, "check") else {"help": argparse.SUPPRESS}
        parser.add_argument(name, **options | shown)
    what = (
        "the settings that this stage uses" if stage else "every setting; after a stage, those that it uses"
    )
    parser.add_argument("-h", "--help", action="help", help=what)
    parser.add_argument("--help-all", action="help", help="every setting")
    parser.add_argument("--version", action="version", version=__version__)
    _explain_settings(parser, list(all_settings()) if shows_all or stage is None else settings_of(stage))
    return parser


def _explain_settings(parser: argparse.ArgumentParser, leaves: list[str]) -> None:
    groups: dict[str, Any] = {}
    for leaf in leaves:
        section, field = all_settings()[leaf]
        if section not in groups:
            about = str(RunConfig.model_fields[section].annotation.__doc__)
            groups[section] = parser.add_argument_group(section, about)
        groups[section].add_argument(f"--{leaf}", help=_help(field), metavar=_metavar(field))


def _metavar(field: FieldInfo) -> str:
    if choices := choices_of(field):
        return "{" + ",".join(choices) + "}"
    parts = list(parts_of(field.annotation))
    name = next(part.__name__.upper() for part in parts if part in (int, float, bool, str, Path))
    return f"{name} ..." if {get_origin(part) for part in parts} & {list, tuple} else name


def _help(field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    notes = [*range_of(field), *([] if default is None else [f"default: {default}"])]
    text = describe(field) + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")  # argparse formats it


def _with_underscores(argument: str) -> str:
    """--train-batch-size=4 as --train_batch_size=4; values keep their dashes."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name == "--help-all":
        return argument
    return name.replace("-", "_").replace("__", "--", 1) + equals + value
