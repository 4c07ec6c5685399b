"""Makes the checkpoints of one run, and finds the one that it goes on from."""

import itertools
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lora_utils.config.training import CheckpointConfig
from lora_utils.storage.checkpoint import (
    Checkpoint,
    CheckpointError,
    newest,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    require_space,
    step_of,
    write_checkpoint,
)
from lora_utils.storage.identity import changes
from lora_utils.storage.mirror import Mirror
from lora_utils.system.files import DamagedError, sweep

LOGGER = logging.getLogger(__name__)
FOLDER = "checkpoints"
MIRROR_SECONDS, RETRY_SECONDS = 300.0, 60.0


class Resumable(Protocol):
    """What a checkpoint is made of, and goes back into."""

    step: int
    steps: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], optimizer_too: bool) -> None: ...


@dataclass(frozen=True)
class Resumed:
    """Where a run starts."""

    step: int = 0
    seconds: float = 0.0
    """Spent on training before."""
    held_out_loss_before: float | None = None
    """Before the first step of all."""
    metrics: bytes = b""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Each time that the run went on: step, and what had changed."""


class CheckpointStore:
    """Checkpoints of one run. In every process but the first it only resumes."""

    def __init__(
        self,
        config: CheckpointConfig,
        output_dir: Path,
        fingerprint: dict[str, dict[str, Any]],
        mirror: Mirror | None,
    ) -> None:
        self.folder = output_dir / FOLDER
        self.saved_step: int | None = None
        """Of the newest checkpoint that is on disk."""
        self._config, self._fingerprint, self._mirror = config, fingerprint, mirror
        self._saved_at = time.monotonic()
        self._paused = False

    def resume(self, trainer: Resumable, is_main: bool) -> Resumed:
        """Put the trainer where the checkpoint of the settings is; at the start where there is none.

        Raises:
            CheckpointError: The checkpoint belongs to another run, or cannot be read.
        """
        if is_main:
            sweep(self.folder)
        found = self._find(is_main)
        if found is None:
            return Resumed()
        changed, optimizer_too = self._compare(found)
        try:
            trainer.load_state_dict(found.state, optimizer_too)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{found.folder} does not fit: {error}; choose a new output_dir") from error
        if found.folder.parent == self.folder:
            self.saved_step = found.step
            if self._mirror:
                self._mirror.offer(found.folder)
        steps = trainer.steps
        if found.step < steps:
            LOGGER.warning("going on from %s: step %d of %d", found.folder, found.step, steps)
        else:
            LOGGER.warning(
                "%s is complete at step %d; more max_train_steps would go on", found.folder, found.step
            )
        history = [*found.about["history"], {"step": found.step, "changed": changed}]
        about = found.about
        return Resumed(found.step, about["seconds"], about["held_out_loss_before"], found.metrics, history)

    def require_space(self, trainer: Resumable) -> None:
        """Ask for room before the first step.

        Raises:
            CheckpointError: There is not enough.
        """
        require_space(self.folder, _size_bytes(trainer))

    def is_due(self, trainer: Resumable) -> bool:
        """Whether a checkpoint is to be made after this step."""
        config, waited_seconds = self._config, time.monotonic() - self._saved_at
        minutes_passed = config.checkpointing_minutes and waited_seconds >= 60 * config.checkpointing_minutes
        again = self._paused and waited_seconds >= RETRY_SECONDS
        at_end = trainer.step == trainer.steps
        return bool(minutes_passed or again or at_end or trainer.step % config.checkpointing_steps == 0)

    def save(self, trainer: Resumable, about: dict[str, Any], metrics: bytes) -> None:
        """Commit a checkpoint and delete old ones; a disk that is full or fails pauses this, and training goes on."""
        self._saved_at = time.monotonic()
        about = about | {"fingerprint": self._fingerprint}
        try:
            require_space(self.folder, _size_bytes(trainer))
            folder = write_checkpoint(self.folder, trainer.state_dict(), about, metrics)
        except (CheckpointError, DamagedError, OSError) as error:
            kept = (
                "there is none yet"
                if self.saved_step is None
                else f"the one of step {self.saved_step} is kept"
            )
            LOGGER.warning(
                "no checkpoint of step %d (%s); %s, and training goes on", trainer.step, error, kept
            )
            self._paused = True
            return
        if self._paused:
            LOGGER.warning("checkpoints are made again, from step %d on", trainer.step)
        self._paused, self.saved_step = False, trainer.step
        try:
            prune_checkpoints(self.folder, self._config.checkpoints_total_limit)
        except OSError as error:
            LOGGER.warning(
                "step %d is saved, but older checkpoints could not be deleted: %s", trainer.step, error
            )
        if self._mirror:
            self._mirror.offer(folder)

    @property
    def mirrored_step(self) -> int | None:
        """Newest step that was read back from the mirror."""
        return self._mirror.safe_step if self._mirror else None

    def finish(self, weights: Path) -> None:
        """Wait until the mirror has everything, the finished weights too."""
        if self._mirror:
            self._mirror.offer_file(weights)
            LOGGER.warning("the mirror gets what it lacks, for at most %.0f minutes", MIRROR_SECONDS / 60)
            if problem := self._mirror.close(MIRROR_SECONDS):
                LOGGER.warning("%s", problem)

    def _find(self, is_main: bool) -> Checkpoint | None:
        wanted = self._config.resume_from_checkpoint
        if wanted == "latest":
            return newest_checkpoint(self.folder)
        if wanted == "none":
            if is_main:
                _make_way(self.folder, 0)
            return None
        places = [Path(wanted), self.folder / wanted]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            there = sorted(path.name for path in self.folder.glob("step-*")) or ["none"]
            raise CheckpointError(
                f"there is no checkpoint {wanted}; resume_from_checkpoint takes latest, none or a folder "
                f"(in {self.folder}: {', '.join(there)})"
            )
        try:
            found = read_checkpoint(folder)
        except DamagedError as error:
            raise CheckpointError(f"{folder} cannot be used ({error}); choose another, or latest") from error
        if is_main:
            _make_way(self.folder, found.step + 1)
        return found

    def _compare(self, found: Checkpoint) -> tuple[list[str], bool]:
        """What changed, and whether the optimiser's states can be taken over."""
        saved = found.about["fingerprint"]
        other = changes(saved["fixed"], self._fingerprint["fixed"])
        if other and not self._config.resume_force:
            raise CheckpointError(
                f"{found.folder} belongs to another run: {'; '.join(other)}. Set these back, choose a new output_dir, "
                "or set resume_force=true to take over what fits"
            )
        changed = other + changes(saved["free"], self._fingerprint["free"])
        if changed:
            LOGGER.warning("since the checkpoint: %s", "; ".join(changed))
        kept = all(
            saved["fixed"].get(name) == self._fingerprint["fixed"][name]
            for name in ("optimizer", "loraplus_lr_ratio")
        )
        if not kept:
            LOGGER.warning("the optimiser's states are of another kind and start afresh")
        return changed, kept


def _make_way(folder: Path, first_step: int) -> None:
    """Move checkpoints from a step on away: what is made now must not mix with an earlier run's, nor delete it."""
    later = [path for path in newest(folder, step_of) if (step_of(path.name) or 0) >= first_step]
    if not later:
        return
    asides = (folder.with_name(f"{FOLDER}.old-{number}") for number in itertools.count(1))
    aside = next(path for path in asides if not path.exists())
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    names = ", ".join(path.name for path in later)
    LOGGER.warning(
        "an earlier run's checkpoints, %s, are in %s now; delete them when they are not needed", names, aside
    )


def _size_bytes(trainer: Resumable) -> int:
    """Of a checkpoint, with two states for each weight, as AdamW has."""
    state = trainer.state_dict()
    kinds = (state["adapter"], state["adapter"], state["adapter"], state["average"])
    return sum(tensor.nbytes for part in kinds for tensor in part.values())
