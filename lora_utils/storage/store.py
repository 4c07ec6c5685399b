"""Makes the checkpoints of one run, and finds the one that it goes on from."""

import itertools
import logging
import time
import uuid
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
from lora_utils.storage.log import WEIGHTS_NAME
from lora_utils.storage.mirror import Mirror
from lora_utils.storage.run_folder import MADE_OF_WEIGHTS, set_aside_run
from lora_utils.system.files import DamagedError, sweep
from lora_utils.system.portable import rename

LOGGER = logging.getLogger(__name__)
FOLDER = "checkpoints"
MIRROR_SECONDS = 300.0
"""At the end of a run, for what the mirror lacks."""
RETRY_SECONDS = 60.0
"""After a checkpoint that could not be made."""


class Resumable(Protocol):
    """What a checkpoint is made of, and goes back into: training's state."""

    step: int
    steps: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Resumed:
    """Where a run starts."""

    step: int = 0
    seconds: float = 0.0
    """Spent on training before."""
    held_out_loss_before: float | None = None
    """Before the first step of all."""
    metrics: bytes = b""
    """metrics.jsonl up to the step."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Each time that the run went on: step, and what had changed."""


class CheckpointStore:
    """Checkpoints of one run. In every process but the first it only reads."""

    def __init__(
        self,
        config: CheckpointConfig,
        output_dir: Path,
        identity: dict[str, dict[str, Any]],
        mirror: Mirror | None,
        is_main: bool = True,
    ) -> None:
        """Look at nothing yet.

        Args:
            config: When checkpoints are made, how many are kept, which one the run goes on from.
            output_dir: The run folder.
            identity: From ``run_identity``; written into every checkpoint, compared with that of a found one.
            mirror: Gets a copy of every checkpoint.
            is_main: This is the first process, which tidies up and writes for all.
        """
        self.folder = output_dir / FOLDER
        self.saved_step: int | None = None
        """Of the newest checkpoint that is on disk."""
        self._config = config
        self._identity = identity
        self._mirror = mirror
        self._is_main = is_main
        self._start: str | None = uuid.uuid4().hex
        """Told apart from another start of the same run by the mirror; earlier versions had none."""
        self._saved_at = time.monotonic()
        self._is_paused = False

    @property
    def mirrored_step(self) -> int | None:
        """Newest step that was read back from the mirror."""
        return self._mirror.safe_step if self._mirror else None

    def resume(self, state: Resumable) -> Resumed:
        """Put the state where the checkpoint of the settings is; at the start where there is none.

        Raises:
            CheckpointError: The checkpoint belongs to another run, or cannot be read.
        """
        if self._is_main:
            sweep(self.folder)
        checkpoint = self._find()
        if checkpoint is None:
            self._begin_mirror(0)
            return Resumed()

        changed = self._compare(checkpoint)
        contents = checkpoint.state
        if not self._fits_optimizer(checkpoint):
            LOGGER.warning("the optimiser's states are of another kind and start afresh")
            contents = contents | {"optimizer": None}
        try:
            state.load_state_dict(contents)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint.folder} does not fit: {error}; choose a new output_dir"
            ) from error

        self._start = checkpoint.about.get("start")
        self._begin_mirror(checkpoint.step)
        # A checkpoint from elsewhere is no checkpoint of this run folder: it is neither counted nor mirrored.
        if checkpoint.folder.parent == self.folder:
            self.saved_step = checkpoint.step
            if self._mirror:
                # The mirror may lack it: the process that made it may have been killed before it was copied.
                self._mirror.offer(checkpoint.folder)
        _tell_where(checkpoint, state.steps)

        about = checkpoint.about
        return Resumed(
            checkpoint.step,
            about["seconds"],
            about["held_out_loss_before"],
            checkpoint.metrics,
            [*about["history"], {"step": checkpoint.step, "changed": changed}],
        )

    def require_space(self, state: Resumable) -> None:
        """Ask for room before the first step.

        Raises:
            CheckpointError: There is not enough.
        """
        require_space(self.folder, _size_bytes(state.state_dict()))

    def is_due(self, state: Resumable) -> bool:
        """Whether a checkpoint is to be made after this step."""
        config = self._config
        waited_seconds = time.monotonic() - self._saved_at
        # Steps decide alone where they can: two equal runs then make equal checkpoints.
        if state.step == state.steps or state.step % config.checkpointing_steps == 0:
            return True
        if self._is_paused and waited_seconds >= RETRY_SECONDS:
            return True
        return (
            config.checkpointing_minutes is not None and waited_seconds >= 60 * config.checkpointing_minutes
        )

    def save(self, state: Resumable, about: dict[str, Any], metrics: bytes) -> None:
        """Commit a checkpoint, delete old ones; where the disk is full or fails, training goes on without.

        Args:
            state: At the step that was just taken.
            about: What JSON can hold: seconds, history, held_out_loss_before.
            metrics: metrics.jsonl up to this step.
        """
        self._saved_at = time.monotonic()
        contents = state.state_dict()
        about = about | {"fingerprint": self._identity, "start": self._start}
        try:
            require_space(self.folder, _size_bytes(contents))
            folder = write_checkpoint(self.folder, contents, about, metrics)
        except (CheckpointError, DamagedError, OSError) as error:
            kept = (
                "there is none yet"
                if self.saved_step is None
                else f"the one of step {self.saved_step} is kept"
            )
            LOGGER.warning("no checkpoint of step %d (%s); %s, and training goes on", state.step, error, kept)
            self._is_paused = True
            return

        if self._is_paused:
            LOGGER.warning("checkpoints are made again, from step %d on", state.step)
        self._is_paused = False
        self.saved_step = state.step
        # Only now, when the new one was read back, may an older one go.
        try:
            prune_checkpoints(self.folder, self._config.checkpoints_total_limit)
        except OSError as error:
            LOGGER.warning(
                "step %d is saved, but older checkpoints could not be deleted: %s", state.step, error
            )
        if self._mirror:
            self._mirror.offer(folder)

    def finish(self, weights: Path) -> None:
        """Wait until the mirror has everything, the finished weights too."""
        if self._mirror:
            _finish_mirror(self._mirror, weights)

    def _begin_mirror(self, step: int) -> None:
        if self._mirror:
            self._mirror.begin(self._start, step)

    def _find(self) -> Checkpoint | None:
        """The checkpoint that resume_from_checkpoint names; those that would come after it are moved away."""
        wanted = self._config.resume_from_checkpoint
        if wanted == "latest":
            return newest_checkpoint(self.folder)
        if wanted == "none":  # an earlier run's checkpoints were set aside when the folder was chosen
            return None

        folder = next((path for path in (Path(wanted), self.folder / wanted) if path.is_dir()), None)
        if folder is None:
            names = sorted(path.name for path in self.folder.glob("step-*")) or ["none"]
            raise CheckpointError(
                f"there is no checkpoint {wanted}; resume_from_checkpoint takes latest, none or a folder "
                f"(in {self.folder}: {', '.join(names)})"
            )
        try:
            checkpoint = read_checkpoint(folder)
        except DamagedError as error:
            raise CheckpointError(f"{folder} cannot be used ({error}); choose another, or latest") from error
        if self._is_main:
            _make_way(self.folder, checkpoint.step + 1)
        return checkpoint

    def _compare(self, checkpoint: Checkpoint) -> list[str]:
        """What changed since the checkpoint was made.

        Raises:
            CheckpointError: Something that makes it another run, unless resume_force.
        """
        saved = checkpoint.about["fingerprint"]
        decisive = changes(saved["fixed"], self._identity["fixed"])
        if decisive and not self._config.resume_force:
            raise CheckpointError(
                f"{checkpoint.folder} belongs to another run: {'; '.join(decisive)}. Set these back, choose "
                "a new output_dir, or set resume_force=true to take over what fits"
            )
        changed = decisive + changes(saved["free"], self._identity["free"])
        if changed:
            LOGGER.warning("since the checkpoint: %s", "; ".join(changed))
        return changed

    def _fits_optimizer(self, checkpoint: Checkpoint) -> bool:
        """Whether the optimiser's states can be taken over: of the same class, in the same groups."""
        saved = checkpoint.about["fingerprint"]["fixed"]
        names = ("optimizer", "loraplus_lr_ratio")
        return all(saved.get(name) == self._identity["fixed"][name] for name in names)


def mirror_complete_run(mirror: Mirror, folder: Path) -> None:
    """Give a mirror what it lacks of a run that is complete in its folder, without loading the run.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    checkpoint = newest_checkpoint(folder / FOLDER)
    if checkpoint is None:
        return
    mirror.begin(checkpoint.about.get("start"), checkpoint.step)
    mirror.offer(checkpoint.folder)
    _finish_mirror(mirror, folder / WEIGHTS_NAME)


def _finish_mirror(mirror: Mirror, weights: Path) -> None:
    mirror.offer_file(weights)
    LOGGER.warning("the mirror gets what it lacks, for at most %.0f minutes", MIRROR_SECONDS / 60)
    if problem := mirror.close(MIRROR_SECONDS):
        LOGGER.warning("%s", problem)


def _tell_where(checkpoint: Checkpoint, steps: int) -> None:
    if checkpoint.step < steps:
        LOGGER.warning("going on from %s: step %d of %d", checkpoint.folder, checkpoint.step, steps)
    else:
        LOGGER.warning(
            "%s is complete at step %d; more max_train_steps would go on", checkpoint.folder, checkpoint.step
        )


def _make_way(folder: Path, first_step: int) -> None:
    """Move checkpoints from a step on away, and the LoRA: what is made now must not mix with them."""
    later = [path for path in newest(folder, step_of) if (step_of(path.name) or 0) >= first_step]
    if not later:
        return
    # Never deleted: the wish may have been a mistake.
    candidates = (folder.with_name(f"{FOLDER}.old-{number}") for number in itertools.count(1))
    aside = next(path for path in candidates if not path.exists())
    aside.mkdir()
    # First: the LoRA is of the last of them.
    if (folder.parent / WEIGHTS_NAME).exists():
        set_aside_run(folder.parent, MADE_OF_WEIGHTS)
    for path in later:
        rename(path, aside / path.name)
    LOGGER.warning(
        "the later checkpoints, %s, are in %s now; delete them when they are not needed",
        ", ".join(path.name for path in later),
        aside,
    )


def _size_bytes(state: dict[str, Any]) -> int:
    """Bytes of a checkpoint with two states for each weight, as AdamW has: there are none before step 1."""
    weights = sum(tensor.nbytes for tensor in state["adapter"].values())
    average = sum(tensor.nbytes for tensor in state["average"].values())
    return 3 * weights + average
