"""The settings of checkpoints: when they are made, where they go, and how a run goes on from them."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from lora_utils.section import Section


class CheckpointConfig(Section):
    """When a run keeps what it has learned, and how it goes on."""

    checkpointing_steps: PositiveInt = 500
    """Steps between checkpoints; there is always one at the end."""
    checkpointing_minutes: PositiveFloat | None = 10.0
    """Minutes between checkpoints, where that comes first."""
    checkpoints_total_limit: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that are kept; at least two, in case the disk damages one."""
    resume_from_checkpoint: Annotated[str, BeforeValidator(lambda value: "none" if value is None else value)] = "none"
    """latest goes on from the newest sound checkpoint of output_dir, where there is one; or a folder; or none."""
    resume_force: bool = False
    """Go on from a checkpoint although settings differ that make it another run; takes over what fits."""
    max_train_minutes: PositiveFloat | None = None
    """Stop with a checkpoint after so long, before the machine is taken away; the same command goes on."""
    mirror_dir: Path | None = None
    """Folder, such as one on Google Drive, that gets a verified copy of every checkpoint; latest restores from it."""
