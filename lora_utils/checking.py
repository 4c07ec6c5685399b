"""The stage check: what this machine is, what a run will use, whether it fits, and what is in its way.

Apart from the other stages, as it loads less than they do, and tells every line as soon as it is known.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_utils.config.doubts import doubts
from lora_utils.config.loading import dump_config
from lora_utils.config.schema import RunConfig
from lora_utils.data.dataset import describe_data, look_for_examples
from lora_utils.memory.cards import Card, card_here, find_card
from lora_utils.memory.machine import description, unwritable
from lora_utils.model.architectures import find_architecture
from lora_utils.model.examination import UnreachableError, examine
from lora_utils.system.collector import collector_paused
from lora_utils.system.steps import Steps, finished

if TYPE_CHECKING:  # what they need takes seconds to load: the first lines stand on the screen meanwhile
    from lora_utils.memory.advice import JudgedForecast
    from lora_utils.memory.forecast import Forecast
    from lora_utils.memory.simulation import SimulationError
    from lora_utils.precompute.data_report import DataReport


@dataclass(frozen=True)
class Check:
    """What ``check`` found; prints as text."""

    machine: str
    """Data, base, disk, memory, versions, card, precision; empty where another card was asked about."""
    judged: "JudgedForecast | SimulationError"
    """What will fit, or why that cannot be said with this torch."""
    config: str
    """Every setting, as YAML; empty likewise."""
    problems: tuple[str, ...] = ()
    """What keeps a run from going well here although its settings are possible, each with its cure."""
    doubts: tuple[str, ...] = ()
    """Settings that will run, and most likely are not meant."""

    @property
    def has_failed(self) -> bool:
        """Some stage will not fit, or something else is in the way."""
        return bool(self.problems) or getattr(self.judged, "has_failed", False)

    @property
    def forecast(self) -> "Forecast":
        """What every stage needs on the card.

        Raises:
            SimulationError: This torch cannot be simulated.
        """
        if isinstance(self.judged, Exception):
            raise self.judged
        return self.judged.forecast

    def __str__(self) -> str:
        remarks = "\n".join([*map(_failure, self.problems), *map(_doubt, self.doubts)])
        return "\n\n".join(part for part in (self.machine, str(self.judged), remarks, self.config) if part)


def check(config: RunConfig, card: str | None = None) -> Check:
    """What this machine is, and what a run will need on its card or on another one; downloads nothing.

    Args:
        config: The run that is asked about.
        card: t4, l4, a100, 8gb and so on; what is here when not given.

    Raises:
        UserError: The machine cannot do what the settings ask for, the data or the base model cannot be used,
            or no card has this name.
    """
    return finished(checking(config, card))


def checking(config: RunConfig, card: str | None = None) -> Generator[str, None, Check]:
    """As ``check``; yields line after line, and says before each alternative that it is tried."""
    found_examples = look_for_examples(config.data)
    examples = len(found_examples.examples) if found_examples else None
    # What will be held out is not known before all files are read; nor are all of the others usable.
    visits = sum(example.repeats for example in found_examples.examples) if found_examples else 0
    told = tuple(doubts(config, round(visits * (1 - config.data.validation_split)) or None))
    if card:
        asked = find_card(card)
        with suppress(UnreachableError):  # of this machine, and it is another one that is asked about
            examine(config.model, config.paths.cache_dir)
        judged = yield from _judged(config, asked, examples)
        yield from _remarks((), told)
        return Check("", judged, "", doubts=told)

    machine = []
    for line in description(config.model, config.paths, describe_data(config.data, found_examples)):
        machine.append(line)
        yield line
    problems = unwritable(config.paths, config.checkpoint)
    try:
        examine(config.model, config.paths.cache_dir)
    except UnreachableError as error:  # all the rest is worth knowing until the machine is online again
        problems.append(str(error))

    yield ""
    judged = yield from _judged_here(config, examples)
    yield from _remarks(problems, told)
    return Check("\n".join(machine), judged, dump_config(config), tuple(problems), told)


def check_data(config: RunConfig) -> "DataReport":
    """Decode every image and read every caption, and say what is wrong before any weight is loaded.

    Raises:
        UserError: There is no data, the base model cannot be used, or a setting is impossible.
    """
    with suppress(UnreachableError):  # tokens are not counted then, and the data can be looked into
        examine(config.model, config.paths.cache_dir)
    with collector_paused():
        from lora_utils.model.base import PretrainedSdxl
        from lora_utils.precompute.data_report import report_on_data

    base = PretrainedSdxl(config.model, config.paths.cache_dir)
    report = report_on_data(config.data, config.train, base)
    return replace(report, doubts=doubts(config, report.visits_per_epoch))


def _judged(
    config: RunConfig, card: Card, examples: int | None
) -> "Generator[str, None, JudgedForecast | SimulationError]":
    """The forecast and its verdict, line by line."""
    architecture = find_architecture(config.model, config.paths.cache_dir)
    yield card.headline(config.train.vram_gib or card.usable_gib, architecture.is_assumed)
    with collector_paused():
        from lora_utils.memory.advice import judging
        from lora_utils.memory.simulation import SimulationError

    lines = Steps(judging(config, card, examples))
    try:
        yield from lines
    except SimulationError as error:  # all the rest of the check is worth having without a forecast
        yield str(error)
        return error
    return lines.result


def _judged_here(
    config: RunConfig, examples: int | None
) -> "Generator[str, None, JudgedForecast | SimulationError]":
    """The same on the device here, where rates and workspaces are measured and may find it full."""
    from lora_utils.system.device import choose_precision, compute_capability
    from lora_utils.system.device_memory import device_given_back

    with device_given_back("end other programs that use it"):
        precision = choose_precision(config.model.mixed_precision, compute_capability())
        return (yield from _judged(config, card_here(precision.dtype), examples))


def _remarks(problems: Sequence[str], told: Sequence[str]) -> Iterator[str]:
    """Lines below the verdict: what fails, then what is doubtful."""
    if problems or told:
        yield ""
    yield from map(_failure, problems)
    yield from map(_doubt, told)


def _doubt(sentence: str) -> str:
    return f"DOUBT {sentence}"


def _failure(problem: str) -> str:
    return f"FAIL  {problem}"
